"""A token dataset: a Delta table of shards, a ledger of inputs, a quarantine, and rolled-up statistics.

    DATASET/shards/       Delta table: Parquet files that the workers wrote, visible through `_delta_log` alone
    DATASET/inputs/       Delta table: the ledger of known inputs, derived from the shards
    DATASET/quarantine/   Delta table: what could not be tokenized, one file for each shard that had rejects
    DATASET/statistics/   one roll-up for each version
    DATASET/recipes/      the resolved recipe of each run
    DATASET/sources.json  what these recipes say of each source, so that a job need not read all of them
    DATASET/vacuumed/     an empty file named for the oldest version that a vacuum has left

Always holds: a work unit is in the table once or not at all. Each commit is a compare-and-swap over one counter, so of
two jobs that finished the same unit one wins and the other's file stays an orphan. A commit costs what it changes: of
what was committed before only names are kept, and only what others committed meanwhile is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, KeysView
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.fs as pafs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.crash import crash_point
from pipelines.sequence import Vocabulary
from pipelines.shards.delta import create_table, is_table, open_table, require_compare_and_swap, swap, update
from pipelines.shards.held import Held, Shard, unit_of
from pipelines.shards.log import File, changes
from pipelines.shards.migrate import DatasetError, require_this_format
from pipelines.shards.quarantine import Quarantine
from pipelines.shards.reader import open_shard
from pipelines.shards.rollup import roll_up, statistics_of
from pipelines.shards.schema import FORMAT_VERSION, SCHEMA
from pipelines.shards.statistics import Statistics
from pipelines.shards.storage import Storage
from pipelines.shards.writer import WrittenShard

__all__ = ["Dataset", "DatasetError", "Shard"]

_COMMIT_TRIES = 20


def _none(units: Collection[str]) -> set[str]:
    return set()


class Dataset:
    """One version of a token dataset."""

    def __init__(self, storage: Storage, table: DeltaTable) -> None:
        self.storage = storage
        self._table = table
        settings = table.metadata().configuration
        require_this_format(storage.uri, settings)
        self.vocabulary = Vocabulary.from_dict(json.loads(settings["braid.vocabulary"]))
        self.validation_share = float(settings["braid.validation_share"])
        self.duplicates = str(settings.get("braid.duplicates", "keep"))
        """Whether training reads all documents of equal content ("keep"), or one ("drop")."""
        self.quarantine = Quarantine(storage)
        self._held_shards: Held | None = None

    @classmethod
    def create(
        cls, uri: str | Path, vocabulary: Vocabulary, *, validation_share: float, duplicates: str = "keep"
    ) -> Self:
        """Make an empty dataset; fails if there is one."""
        storage = Storage.of(uri)
        configuration: dict[str, str | None] = {
            "braid.format_version": str(FORMAT_VERSION),
            "braid.fingerprint": vocabulary.fingerprint,
            "braid.vocabulary": json.dumps(vocabulary.to_dict()),
            "braid.validation_share": str(validation_share),
            "braid.duplicates": duplicates,
        }
        require_compare_and_swap(storage)
        Quarantine.create(storage)
        table = create_table(
            storage.below("shards"), SCHEMA, configuration=configuration, raise_if_key_not_exists=False
        )
        return cls(storage, table)

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        return is_table(Storage.of(uri).below("shards"))

    @classmethod
    def open(cls, uri: str | Path, version: int | None = None) -> Self:
        """Open a dataset at its newest version, or pinned to an earlier one.

        Raises:
            DatasetError: nothing there, no such version, or another format.
        """
        storage = Storage.of(uri)
        if version is not None and version < (oldest := oldest_version(storage)):
            raise DatasetError(
                f"{uri}: version {version} is gone, a `braid vacuum --keep-versions` removed its shards; "
                f"it has versions {oldest} to {cls.open(uri).version}"
            )
        try:
            return cls(storage, open_table(storage.below("shards"), version))
        except TableNotFoundError as error:
            raise DatasetError(f"{uri}: no token dataset here; make one with `braid tokenize RECIPE.yaml`") from error
        except DeltaError as error:
            if version is None:
                raise
            newest = cls.open(uri).version
            oldest = oldest_version(storage)
            raise DatasetError(f"{uri}: no version {version}; it has versions {oldest} to {newest}") from error

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def version(self) -> int:
        return int(self._table.version())

    def shards(self) -> list[Shard]:
        """The committed files of this version, by name."""
        return sorted(self._held.names.values(), key=lambda shard: shard.name)

    @property
    def names(self) -> KeysView[str]:
        """The file names of this version's shards."""
        return self._held.names.keys()

    @property
    def units(self) -> KeysView[str]:
        """The units that this version holds."""
        return self._held.units.keys()

    @property
    def _held(self) -> Held:
        if self._held_shards is None:
            actions = pa.table(self._table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"])
            rows = zip(*(column.to_pylist() for column in actions.columns), strict=True)
            self._held_shards = Held(self.storage.below("shards"), (File(*row) for row in rows))
        return self._held_shards

    def refresh(self) -> None:
        """Move on to the newest version; only what was committed since is read."""
        before = self.version
        update(self.storage.below("shards"), self._table)
        if self._held_shards and self.version > before:
            self._held_shards.apply(changes(self.storage.below("shards"), before + 1, self.version))

    def commit(
        self, written: Collection[WrittenShard], *, ancestors: Callable[[Collection[str]], set[str]] = _none
    ) -> list[WrittenShard]:
        """Make finished units visible, and the units that they replace invisible, in one step.

        Left out, their files staying as orphans, are units that another job has committed meanwhile, and units whose
        successor it has committed.

        Args:
            ancestors: the units that some units replace, directly or through others; asked anew for each attempt, after
                the table was read, so that of two jobs that saw an input in two states the later state stays.

        Returns:
            What was committed.

        Raises:
            DatasetError: other jobs kept committing first, or a file is no longer there.
        """
        self._require_whole(written)
        for attempt in range(_COMMIT_TRIES):
            self.refresh()
            held = self._held.units
            outdated = ancestors(held.keys())
            # By unit, should two attempts at one have come to an end.
            new = list({w.unit: w for w in written if w.unit not in held and w.unit not in outdated}.values())
            if not new:
                return []
            outdated |= ancestors([w.unit for w in new])
            removed = [held[unit] for unit in outdated if unit in held]
            version = self.version + 1
            crash_point("before_commit")
            # Before their shards: the quarantine is read through the shards.
            self.quarantine.add(new)
            crash_point("after_rejects")
            if not self._swap(new, removed):
                # Another job's commit came first. Wait a little longer each time, then look at what it did.
                time.sleep(0.05 * (attempt + 1))
                continue
            crash_point("after_commit")
            roll_up(self.storage, self.vocabulary, version, new, [shard.name for shard in removed])
            crash_point("after_roll_up")
            self.refresh()
            return new
        raise DatasetError(f"{self.uri}: {_COMMIT_TRIES} commits in a row lost against other jobs; run it again later")

    def _swap(self, new: Collection[WrittenShard], removed: Collection[Shard]) -> bool:
        """Make the version after this handle's; False if there is one."""
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(w.name, w.size, {}, now, True, json.dumps({"numRecords": w.rows})) for w in new
        ]
        actions += [
            RemoveAction(path=shard.name, data_change=True, deletion_timestamp=now, size=shard.size)
            for shard in removed
        ]
        # Delta would drop the log of old versions, and a pinned one must stay readable until a vacuum.
        return swap(self.storage.below("shards"), self._table, actions, SCHEMA, keep_log=True)

    def _require_whole(self, written: Collection[WrittenShard]) -> None:
        """Never name a file that is not there: a vacuum may have taken one that waited too long for its commit."""
        infos = self.storage.below("shards").info([w.name for w in written])
        for shard, info in zip(written, infos, strict=True):
            if info.type == pafs.FileType.NotFound or info.size != shard.size:
                raise DatasetError(
                    f"{info.path}: written with {shard.size} bytes, but now {'missing' if info.size is None else info.size}; "
                    "it is not committed. Run the job again, and vacuum with more --older-than-hours than a job takes"
                )

    def quarantined(self, reasons: Collection[str] = ()) -> list[dict[str, Any]]:
        """What could not be tokenized: source, position, reason, error, for the units that this version holds.

        Args:
            reasons: only these; all if there are none.
        """
        rows = [row for file in self.quarantine.files(self.names) for row in self.quarantine.read(file).to_pylist()]
        return [row for row in rows if not reasons or row["reason"] in reasons]

    def rejects(self) -> int:
        """How many documents are quarantined; no file is read for it."""
        return sum(file.rows for file in self.quarantine.files(self.names))

    def rejected_units(self, reasons: Collection[str] = ()) -> set[str]:
        """The units of this version that have rejects, or rejects for one of these reasons."""
        files = self.quarantine.files(self.names)
        return {
            unit_of(file.name)
            for file in files
            if not reasons or not set(reasons).isdisjoint(self.quarantine.read(file)["reason"].to_pylist())
        }

    def statistics(self) -> Statistics:
        """The statistics of this version, from its roll-up."""
        return statistics_of(self.storage, self.vocabulary, self.version)

    def read(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, shard by shard in the order of their names, checksums verified."""
        for shard in self.shards():
            with open_shard(self.storage, shard.name) as file:
                yield from file.iter_batches(batch_size=4096, columns=columns)


def oldest_version(dataset: Storage) -> int:
    """The oldest version that vacuums have left readable."""
    return max((int(name) for name in dataset.names("vacuumed")), default=0)
