"""A token dataset: a Delta table of shards, a ledger of inputs, a quarantine, and rolled-up statistics.

    DATASET/shards/       Delta table: Parquet files that the workers wrote, visible through `_delta_log` alone
    DATASET/inputs/       Delta table: the ledger of known inputs, derived from the shards
    DATASET/quarantine/   Delta table: what could not be tokenized, one file for each shard that had rejects
    DATASET/statistics/   one roll-up for each version
    DATASET/recipes/      the resolved recipe of each run

Always holds: a work unit is in the table once or not at all. Each commit is a compare-and-swap over one counter, so of
two jobs that finished the same unit one wins and the other's file stays an orphan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.sequence import Vocabulary
from pipelines.shards.reader import open_shard, read_footer
from pipelines.shards.schema import FORMAT_VERSION, SCHEMA
from pipelines.shards.statistics import Statistics
from pipelines.shards.storage import Storage
from pipelines.shards.writer import REJECT_SCHEMA, WrittenShard

_APP = "braid"
"""Application id of the commits' counter."""

_COMMIT_TRIES = 20


def _none(units: Collection[str]) -> set[str]:
    return set()


class DatasetError(ValueError):
    """A dataset cannot be opened or used as asked. The message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One committed Parquet file."""

    name: str
    path: str
    """Where the file lies: a local path, or a key with its bucket for an object store."""
    size: int
    """Bytes."""
    rows: int

    @property
    def unit(self) -> str:
        """The work unit that the shard holds."""
        return unit_of(self.name)


def unit_of(name: str) -> str:
    """The unit in a shard's file name `<unit>-<attempt>-<footer checksum>.parquet`."""
    return name.partition("-")[0]


class Dataset:
    """One version of a token dataset."""

    def __init__(self, storage: Storage, table: DeltaTable) -> None:
        self.storage = storage
        self._table = table
        settings = table.metadata().configuration
        written = int(settings.get("braid.format_version", "0"))
        if written != FORMAT_VERSION:
            raise DatasetError(
                f"{storage.uri}: written in format {written}, this Braid reads {FORMAT_VERSION}; "
                + ("update Braid" if written > FORMAT_VERSION else "it is no Braid dataset, or one of before 0.1")
            )
        self.vocabulary = Vocabulary.from_dict(json.loads(settings["braid.vocabulary"]))
        self.validation_share = float(settings["braid.validation_share"])

    @classmethod
    def create(cls, uri: str | Path, vocabulary: Vocabulary, *, validation_share: float) -> Self:
        """Make an empty dataset; fails if there is one."""
        storage = Storage.of(uri)
        configuration: dict[str, str | None] = {
            "braid.format_version": str(FORMAT_VERSION),
            "braid.fingerprint": vocabulary.fingerprint,
            "braid.vocabulary": json.dumps(vocabulary.to_dict()),
            "braid.validation_share": str(validation_share),
        }
        quarantine = storage.below("quarantine").uri
        DeltaTable.create(quarantine, REJECT_SCHEMA, mode="ignore")
        table = DeltaTable.create(
            storage.below("shards").uri, SCHEMA, configuration=configuration, raise_if_key_not_exists=False
        )
        return cls(storage, table)

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        return bool(DeltaTable.is_deltatable(Storage.of(uri).below("shards").uri))

    @classmethod
    def open(cls, uri: str | Path, version: int | None = None) -> Self:
        """Open a dataset at its newest version, or pinned to an earlier one.

        Raises:
            DatasetError: nothing there, no such version, or another format.
        """
        storage = Storage.of(uri)
        try:
            return cls(storage, DeltaTable(storage.below("shards").uri, version=version))
        except TableNotFoundError as error:
            raise DatasetError(f"{uri}: no token dataset here; make one with `braid tokenize RECIPE.yaml`") from error
        except DeltaError as error:
            if version is None:
                raise
            newest = cls.open(uri).version
            raise DatasetError(f"{uri}: no version {version}; it has versions 0 to {newest}") from error

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def version(self) -> int:
        return int(self._table.version())

    def shards(self) -> list[Shard]:
        """The committed files of this version, by name."""
        actions = pa.table(self._table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"])
        folder = self.storage.below("shards")
        return sorted(
            (
                Shard(name=a["path"], path=folder.path(a["path"]), size=a["size_bytes"], rows=a["num_records"])
                for a in actions.to_pylist()
            ),
            key=lambda shard: shard.name,
        )

    def refresh(self) -> None:
        """Move on to the newest version."""
        self._table.update_incremental()

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
            DatasetError: other jobs kept committing first.
        """
        for attempt in range(_COMMIT_TRIES):
            self.refresh()
            held = {shard.unit: shard for shard in self.shards()}
            outdated = ancestors(held)
            new = [w for w in written if w.unit not in held and w.unit not in outdated]
            if not new:
                return []
            outdated |= ancestors([w.unit for w in new])
            removed = [shard for unit, shard in held.items() if unit in outdated]
            counter = (self._table.transaction_version(_APP) or 0) + 1
            version = self.version + 1
            self._commit_rejects(new)
            now = int(time.time() * 1000)
            actions: list[AddAction | RemoveAction] = [
                AddAction(w.name, w.size, {}, now, True, json.dumps({"numRecords": w.rows})) for w in new
            ]
            actions += [
                RemoveAction(path=shard.name, data_change=True, deletion_timestamp=now, size=shard.size)
                for shard in removed
            ]
            try:
                self._table.create_write_transaction(
                    actions,
                    "append",
                    SCHEMA,
                    commit_properties=CommitProperties(
                        app_transactions=[Transaction(_APP, counter)], max_commit_retries=0
                    ),
                )
            except CommitFailedError:
                # Another job's commit came first. Wait a little longer each time, then look at what it did.
                time.sleep(0.05 * (attempt + 1))
                continue
            self._roll_up(version, new, whole=bool(removed))
            self.refresh()
            return new
        raise DatasetError(f"{self.uri}: {_COMMIT_TRIES} commits in a row lost against other jobs; run it again later")

    def _commit_rejects(self, written: Collection[WrittenShard]) -> None:
        """Name the rejects' files in the quarantine table, before their shards: it is read through the shards."""
        with_rejects = [w for w in written if w.rejects]
        if not with_rejects:
            return
        now = int(time.time() * 1000)
        DeltaTable(self.storage.below("quarantine").uri).create_write_transaction(
            [
                AddAction(w.name, w.rejects_size, {}, now, True, json.dumps({"numRecords": w.rejects}))
                for w in with_rejects
            ],
            "append",
            REJECT_SCHEMA,
        )

    def quarantined(self) -> list[dict[str, Any]]:
        """What could not be tokenized: source, position, reason, error, for the units that this version holds."""
        held = {shard.name for shard in self.shards()}
        folder = self.storage.below("quarantine")
        rows: list[dict[str, Any]] = []
        listed = pa.table(DeltaTable(folder.uri).get_add_actions(flatten=True))["path"].to_pylist()
        for name in sorted(set(listed) & held):
            rows += pq.read_table(folder.path(name), filesystem=folder.filesystem).to_pylist()
        return rows

    def statistics(self) -> Statistics:
        """The statistics of this version, from its roll-up.

        Where a job died between its commit and its roll-up, the footers of the shards since the last one are added.
        """
        name = _roll_up_name(self.version)
        if self.storage.exists(name):
            return Statistics.from_json(json.loads(self.storage.read(name)))
        rolled = [int(n.removesuffix(".json")) for n in self.storage.names("statistics")]
        earlier = max((v for v in rolled if v < self.version), default=None)
        statistics, known = Statistics.empty(self.vocabulary), set()
        names = {shard.name for shard in self.shards()}
        if earlier is not None:
            base = type(self).open(self.uri, earlier)
            known = {shard.name for shard in base.shards()}
            if known <= names:
                statistics = base.statistics()
            else:
                known = set()
        for missing in sorted(names - known):
            footer = read_footer(self.storage, missing)
            statistics.merge(Statistics.from_json(json.loads(footer["statistics"])))
        return statistics

    def _roll_up(self, version: int, new: Collection[WrittenShard], *, whole: bool) -> None:
        """Write the statistics of the version that this commit made, whatever others have committed since."""
        previous = _roll_up_name(version - 1)
        if whole or not self.storage.exists(previous):
            statistics = type(self).open(self.uri, version).statistics()
        else:
            statistics = Statistics.from_json(json.loads(self.storage.read(previous)))
            for shard in new:
                statistics.merge(Statistics.from_json(shard.statistics))
        self.storage.write(_roll_up_name(version), json.dumps(statistics.to_json()).encode())

    def read(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, shard by shard in the order of their names, checksums verified."""
        for shard in self.shards():
            with open_shard(self.storage, shard.name) as file:
                yield from file.iter_batches(batch_size=4096, columns=columns)


def _roll_up_name(version: int) -> str:
    return f"statistics/{version:020d}.json"
