"""The ledger: which inputs are known, at which state, in which unit.

Enters: planned units. Leaves: for planning, one row a slice with only what planning compares; whole units on request. Always
holds: what was written stays, so an input keeps its unit for ever, and of two jobs that plan at once one sees the other's
units before it writes its own (compare-and-swap, as for shards). It can be made again from the shards.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction, RemoveAction

from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.delta import ensure_table, is_table, open_table, swap, update
from pipelines.shards.reader import read_footer
from pipelines.shards.storage import Storage
from pipelines.tokenize.units import WorkUnit

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.string()),
        pa.field("replaces", pa.list_(pa.field("element", pa.string()))),
        pa.field("source", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
        pa.field("parts", pa.list_(pa.field("element", pa.string()))),
        pa.field("divisible", pa.bool_()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
    ]
)

COMPARED = pa.schema([pa.field(name, pa.large_string()) for name in ("unit", "source", "uri", "etag")])
"""What planning compares. Large strings, because together they may pass 2 GB."""

TRIES = 20
"""Writes that may be lost against other jobs before a job gives up."""

_GROUP_ROWS = 2**15
"""Rows of a Parquet row group: what is read at least to have a unit's parts."""

_READERS = 8
"""Footers read at once."""

_SMALL_FILES = 32
"""So many files of less than a row group are merged into one."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    rows: int
    written: int


class Ledger:
    """The inputs table of a dataset. In memory are about 150 bytes a row."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.below("inputs")
        ensure_table(self._storage, LEDGER_SCHEMA)
        self._table = open_table(self._storage)
        self._read_at = -1
        self._forget()
        self.refresh()

    @classmethod
    def existing(cls, storage: Storage) -> Self | None:
        """The ledger of a dataset, if it has one."""
        return cls(storage) if is_table(storage.below("inputs")) else None

    def _forget(self) -> None:
        self._files: list[_File] = []
        self.rows: pa.Table = COMPARED.empty_table()
        """`COMPARED` of every slice of every unit; a unit's slices follow one another. `uri` is null where a unit reads
        nothing."""
        self.known: set[str] = set()
        """All units, those that others replace too."""
        self.replaces: dict[str, tuple[str, ...]] = {}
        """What units replace, for those that replace any."""

    def refresh(self) -> None:
        """Read what other jobs, or this one, have written since the last time."""
        update(self._storage, self._table)
        if self._table.version() == self._read_at:
            return
        listed = self._listed()
        if set(self._files) - set(listed):
            # A compaction took files away. It does not say which rows of its new file were in them.
            self._forget()
        seen = set(self._files)
        self._load([file for file in listed if file not in seen])
        self._read_at = self._table.version()

    def _listed(self) -> list[_File]:
        """The files of the newest version, oldest first, so that rows stay in the order of their planning."""
        columns = ["path", "size_bytes", "num_records", "modification_time"]
        actions = pa.table(self._table.get_add_actions(flatten=True)).select(columns)
        times = actions["modification_time"].cast(pa.int64())
        rows = zip(*(column.to_pylist() for column in (*actions.columns[:3], times)), strict=True)
        return sorted((_File(*row) for row in rows), key=lambda file: (file.written, file.name))

    def _load(self, files: list[_File]) -> None:
        parts = [self.rows]
        for file in files:
            table = self._read(file, ["unit", "replaces", *COMPARED.names[1:]])
            replacing = table.filter(pc.greater(pc.list_value_length(table["replaces"]), 0))
            for unit, replaces in zip(replacing["unit"].to_pylist(), replacing["replaces"].to_pylist(), strict=True):
                self.replaces[unit] = tuple(replaces)
            self.known.update(pc.unique(table["unit"]).to_pylist())
            parts.append(table.select(COMPARED.names).cast(COMPARED))
            self._files.append(file)
        self.rows = pa.concat_tables(parts)

    def _read(self, file: _File, columns: list[str] | None = None) -> pa.Table:
        with self._open(file) as parquet:
            return parquet.read(columns)

    @contextlib.contextmanager
    def _open(self, file: _File) -> Iterator[pq.ParquetFile]:
        with (
            self._storage.open(file.name) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as parquet,
        ):
            yield parquet

    def units(self, names: Collection[str]) -> list[WorkUnit]:
        """Some units whole; only the row groups that hold them are read."""
        wanted = pa.array(sorted(names), pa.large_string())
        indices = np.flatnonzero(pc.is_in(self.rows["unit"], value_set=wanted).to_numpy())
        grouped: dict[str, list[dict[str, object]]] = defaultdict(list)
        first = 0
        for file in self._files:
            here = indices[(indices >= first) & (indices < first + file.rows)] - first
            first += file.rows
            if not len(here):
                continue
            with self._open(file) as parquet:
                sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
                groups = np.unique(np.searchsorted(np.cumsum(sizes), here, side="right"))
                table = parquet.read_row_groups(groups.tolist())
            for row in table.filter(pc.is_in(table["unit"], value_set=wanted.cast(pa.string()))).to_pylist():
                grouped[row["unit"]].append(row)
        return [WorkUnit.from_rows(rows) for rows in grouped.values()]

    def ancestors(self, units: Collection[str]) -> set[str]:
        """What these units replace, and what that replaced, back to the first: the middle ones may never have been done.

        Costs time in proportion to what was ever replaced, not to `units`, in which only names are looked up.
        """
        self.refresh()
        found: set[str] = set()
        open_ids = (
            [name for name in units if name in self.replaces]
            if len(units) < len(self.replaces)
            else [name for name in self.replaces if name in units]
        )
        while open_ids:
            for name in self.replaces[open_ids.pop()]:
                if name not in found:
                    found.add(name)
                    if name in self.replaces:
                        open_ids.append(name)
        return found

    def append(self, units: Collection[WorkUnit]) -> bool:
        """Remember new units; False if another job has written to the ledger since the last `refresh`."""
        if not units:
            return True
        rows = (row for unit in units for row in unit.rows())
        chunks = iter(lambda: list(islice(rows, _GROUP_ROWS)), [])
        return self._swap((pa.RecordBatch.from_pylist(chunk, LEDGER_SCHEMA) for chunk in chunks), [])

    def compact(self) -> None:
        """Merge small files, if there are many: each run that found something new has left one."""
        self.refresh()
        small = [file for file in self._files if file.rows < _GROUP_ROWS]
        if len(small) >= _SMALL_FILES:
            merged = pa.concat_tables(self._read(file) for file in small).combine_chunks()
            # If another job writes at this moment, the next one compacts.
            self._swap(merged.to_batches(_GROUP_ROWS), small)

    def repair(self, dataset: Dataset) -> None:
        """Add the units that the shards hold and the ledger does not, from the shards' footers."""
        for _ in range(TRIES):
            self.refresh()
            lost = [shard for shard in dataset.shards() if shard.unit not in self.known]
            with ThreadPoolExecutor(_READERS) as pool:
                footers = list(pool.map(lambda shard: read_footer(dataset.storage, shard.name)["unit"], lost))
            if self.append([WorkUnit.from_rows(json.loads(footer)["rows"]) for footer in footers]):
                return
        raise DatasetError(f"{self._storage.uri}: {TRIES} writes in a row lost against other jobs; try later")

    def _swap(self, batches: Iterable[pa.RecordBatch], gone: Iterable[_File]) -> bool:
        """Commit one new file in place of some; False, and nothing done, if the table is not as it was read."""
        sink, rows = pa.BufferOutputStream(), 0
        with pq.ParquetWriter(sink, LEDGER_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += len(batch)
        data = sink.getvalue()
        name = f"{uuid.uuid4().hex}.parquet"
        self._storage.write(name, data)
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [
            AddAction(name, data.size, {}, now, True, json.dumps({"numRecords": rows})),
            *(RemoveAction(path=f.name, data_change=True, deletion_timestamp=now, size=f.size) for f in gone),
        ]
        if not swap(self._storage, self._table, actions, LEDGER_SCHEMA):
            self._storage.delete(name)
            return False
        return True
