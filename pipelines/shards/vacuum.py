"""Remove the files that nobody will ask for: orphans of killed and losing attempts and, on request, old versions.

Enters: a dataset. Leaves: what was removed. Always holds: no file younger than the stated age goes, for it may belong to a
running job; every version that can be opened afterwards stays whole; and a vacuum that was killed is finished by the next.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.shards.dataset import Dataset, oldest_version
from pipelines.shards.delta import open_table
from pipelines.shards.log import commit_name, commits
from pipelines.shards.rollup import roll_up_name, rolled_up_versions
from pipelines.shards.storage import Storage

_THREADS = 16
"""Files deleted at once: on an object store each is a round trip."""

_TABLES = ("shards", "quarantine", "inputs")

# `.name.part` and `.name.1a2b3c4d` are this project's, the others are what deltalake leaves of a commit that was killed.
_TEMPORARY = re.compile(r"\..*\.(part|[0-9a-f]{8})|_commit_.*\.tmp|.*#\d+")


@dataclass(frozen=True, slots=True)
class Removed:
    """A file that is gone, or would be."""

    kind: str
    """`shard`, `quarantine`, `ledger`, `statistics` or `temporary`."""
    path: str
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vacuumed:
    """What a vacuum did."""

    removed: list[Removed]
    oldest: int
    """The oldest version that can be opened afterwards."""

    @property
    def size(self) -> int:
        """Bytes that were freed."""
        return sum(file.size for file in self.removed)


def vacuum(
    dataset: Dataset, *, older_than_hours: float = 24.0, keep_versions: int | None = None, dry_run: bool = False
) -> Vacuumed:
    """Remove files that no version needs.

    Args:
        older_than_hours: younger files stay, and so do versions that were the newest one within these hours. It must be
            longer than a finished unit ever waits for its commit.
        keep_versions: keep only so many versions, the newest ones; all that can be opened now by default.
    """
    storage, before = dataset.storage, time.time() - 3600 * older_than_hours
    # The files first, then the versions: what is committed in between is among the versions.
    files = {folder: _old_files(storage, folder, before) for folder in (*_TABLES, "statistics", "recipes", "")}
    dataset.refresh()
    oldest = oldest_version(storage)
    if keep_versions is not None:
        oldest = max(oldest, min(dataset.version - keep_versions + 1, _newest_at(dataset, before)))
    named = {file.name: file for file in dataset.quarantine.files()}
    shards, rejects = ({n: i for n, i in files[f].items() if n.endswith(".parquet")} for f in ("shards", "quarantine"))
    needless = _needless(dataset, oldest, {*shards, *rejects, *named})
    removed = [
        *(Removed("shard", i.path, i.size) for name, i in shards.items() if name in needless),
        *(Removed("quarantine", i.path, i.size) for name, i in rejects.items() if name in needless),
        *(Removed("ledger", i.path, i.size) for i in _stale_ledger_files(storage, files["inputs"])),
        *(
            Removed("statistics", i.path, i.size)
            for name in map(roll_up_name, rolled_up_versions(storage))
            if name < roll_up_name(oldest) and (i := files["statistics"].get(name.rpartition("/")[2]))
        ),
        *(Removed("temporary", i.path, i.size) for i in _temporary_files(storage, files, before)),
    ]
    result = Vacuumed(removed=removed, oldest=oldest)
    if dry_run:
        return result
    if oldest > oldest_version(storage):
        # Before anything goes: nobody shall open a version that is half gone.
        storage.write(f"vacuumed/{oldest:020d}", b"")
    staying = set(storage.names("quarantine")) - (needless & rejects.keys())
    dataset.quarantine.remove([file for name, file in named.items() if name in needless and name not in staying])
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda file: storage.delete(file.path.removeprefix(f"{storage.root}/")), removed))
    return result


def _needless(dataset: Dataset, oldest: int, names: set[str]) -> set[str]:
    """Those of some shards' names that no version from `oldest` on has."""
    needless = names - dataset.names
    if needless:
        for commit in commits(dataset.storage.below("shards"), oldest + 1, dataset.version):
            # What a later commit removed was there at the oldest version, or came after it.
            needless -= commit.added.keys() | commit.removed
    return needless


def _newest_at(dataset: Dataset, moment: float) -> int:
    """The version that was the newest at a moment, by the times of the log's files; 0 before the first."""
    log = {info.base_name: info for info in dataset.storage.listed("shards/_delta_log")}
    version = dataset.version
    while version and (info := log.get(commit_name(version).rpartition("/")[2])) and info.mtime_ns / 1e9 > moment:
        version -= 1
    return version


def _stale_ledger_files(storage: Storage, old: dict[str, pafs.FileInfo]) -> Iterable[pafs.FileInfo]:
    """What a compaction replaced, or a job that was killed before its commit left."""
    candidates = {name: info for name, info in old.items() if name.endswith(".parquet")}
    if not candidates:
        return []
    actions = pa.table(open_table(storage.below("inputs")).get_add_actions(flatten=True))
    current = set(actions["path"].to_pylist())
    return [info for name, info in candidates.items() if name not in current]


def _temporary_files(
    storage: Storage, files: dict[str, dict[str, pafs.FileInfo]], before: float
) -> Iterable[pafs.FileInfo]:
    logs = [_old_files(storage, f"{table}/_delta_log", before) for table in _TABLES]
    return [info for folder in (*files.values(), *logs) for name, info in folder.items() if _TEMPORARY.fullmatch(name)]


def _old_files(storage: Storage, folder: str, before: float) -> dict[str, pafs.FileInfo]:
    return {info.base_name: info for info in storage.listed(folder) if info.mtime_ns / 1e9 < before}
