"""What could not be tokenized: a Delta table with one file for each shard that had rejects, under the shard's name.

Enters: written shards. Leaves: their rejects. Always holds: a file counts only through a shard of the version that asks,
so rejects come and go with their unit, and are named here before their shard is committed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Container

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from pipelines.shards.delta import append, ensure_table, open_table, update
from pipelines.shards.log import File
from pipelines.shards.storage import Storage
from pipelines.shards.writer import REJECT_SCHEMA, WrittenShard


class Quarantine:
    """The quarantine of a dataset, whatever its version."""

    def __init__(self, dataset: Storage) -> None:
        self._folder = dataset.below("quarantine")
        self._opened: DeltaTable | None = None

    @staticmethod
    def create(dataset: Storage) -> None:
        ensure_table(dataset.below("quarantine"), REJECT_SCHEMA)

    def add(self, written: Collection[WrittenShard]) -> None:
        """Name the rejects' files of some shards."""
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(w.name, w.rejects_size, {}, now, True, json.dumps({"numRecords": w.rejects}))
            for w in written
            if w.rejects
        ]
        if actions:
            append(self._folder, self._table, actions, REJECT_SCHEMA)

    def files(self, shards: Container[str] | None = None) -> list[File]:
        """The files of some shards, or all, by name."""
        actions = pa.table(self._table.get_add_actions(flatten=True)).select(["path", "size_bytes", "num_records"])
        rows = zip(*(column.to_pylist() for column in actions.columns), strict=True)
        return sorted((File(*row) for row in rows if shards is None or row[0] in shards), key=lambda file: file.name)

    def remove(self, files: Collection[File]) -> None:
        """Name some files no longer; they stay on the disk."""
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            RemoveAction(path=file.name, data_change=True, deletion_timestamp=now, size=file.size) for file in files
        ]
        if actions:
            append(self._folder, self._table, actions, REJECT_SCHEMA)

    def read(self, file: File) -> pa.Table:
        """The rejects in a file: source, position, reason, error."""
        with self._folder.open(file.name) as source:
            return pq.ParquetFile(source, page_checksum_verification=True).read()

    @property
    def _table(self) -> DeltaTable:
        """The newest version."""
        if self._opened is None:
            self._opened = open_table(self._folder)
        else:
            update(self._folder, self._opened)
        return self._opened
