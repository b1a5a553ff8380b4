"""Rows of a dataset, found by index, by id or by what they hold.

Enters: a dataset version. Leaves: `StoredRow`s. Always holds: of a shard only the columns that decide are read, and of a row
that was found its row group alone; a search stops at its limit.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.reader import open_shard

_ROW_ID_DIGITS = 32

_SPAN_MODALITIES = "spans.list.element.modality"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """A row as it lies in its shard."""

    shard: str
    """File name."""
    values: dict[str, Any]
    """By column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a row must be."""

    source: str = ""
    """A source's name, or a glob over whole source identities, `<name>/<path or record>`; `*` crosses folders."""
    modalities: tuple[Modality, ...] = ()
    """The row has spans of all of these."""
    min_tokens: int = 0
    max_tokens: int | None = None


def find_row(dataset: Dataset, row: str) -> StoredRow:
    """A row by its index (0 .. documents - 1, in the order of the shards' names) or by its id or a beginning of it.

    Raises:
        DatasetError: no such row, or several that begin so.
    """
    if row.isdecimal() and len(row) < 12:
        return next(rows_at(dataset, [int(row)]))
    return _row_named(dataset, row)


def rows_at(dataset: Dataset, indices: Iterable[int]) -> Iterator[StoredRow]:
    """Rows by their indices, in ascending order; only the shards that hold them are opened.

    Raises:
        DatasetError: no such row.
    """
    wanted = sorted(set(indices))
    before = 0
    for shard in dataset.shards():
        if not wanted:
            return
        inside = [index - before for index in wanted if index < before + shard.rows]
        if inside:
            yield from _read(dataset, shard.name, inside)
            wanted = wanted[len(inside) :]
        before += shard.rows
    if wanted:
        there = f"has rows 0 to {before - 1}" if before else "has no rows"
        raise DatasetError(f"{dataset.uri}: no row {wanted[0]}; version {dataset.version} {there}")


def spread(dataset: Dataset, count: int) -> list[int]:
    """Indices of at most so many rows, spread evenly."""
    documents = sum(shard.rows for shard in dataset.shards())
    return [i * documents // count for i in range(count)] if count < documents else list(range(documents))


def search(dataset: Dataset, wanted: Search, limit: int) -> Iterator[StoredRow]:
    """The first rows that are as wanted, in the order of their indices."""
    return islice(_search(dataset, wanted), limit)


def _search(dataset: Dataset, wanted: Search) -> Iterator[StoredRow]:
    for shard in dataset.shards():
        with open_shard(dataset.storage, shard.name) as file:
            for group in range(file.num_row_groups):
                if not _may_hold(file.metadata.row_group(group), wanted):
                    continue
                found = np.flatnonzero(_matches(file, group, wanted))
                if len(found):
                    rows = file.read_row_group(group)
                    for index in found.tolist():
                        yield StoredRow(shard=shard.name, values=rows.slice(index, 1).to_pylist()[0])


def _may_hold(group: pq.RowGroupMetaData, wanted: Search) -> bool:
    """Whether the statistics of a row group leave room for a row as wanted."""
    ranges = {}
    for index in range(group.num_columns):
        column = group.column(index)
        if column.statistics is not None and column.statistics.has_min_max:
            ranges[column.path_in_schema] = column.statistics.min, column.statistics.max
    low, high = ranges.get("num_tokens", (0, wanted.min_tokens))
    if high < wanted.min_tokens or (wanted.max_tokens is not None and low > wanted.max_tokens):
        return False
    return all(
        ranges.get(f"num_{modality.label}", (0, 1))[1] > 0
        for modality in wanted.modalities
        if modality is not Modality.TEXT
    )


def _matches(file: pq.ParquetFile, group: int, wanted: Search) -> NDArray[np.bool_]:
    """Which rows of a row group are as wanted, bool [rows]."""
    columns = ["num_tokens", *(["source"] if wanted.source else []), *([_SPAN_MODALITIES] if wanted.modalities else [])]
    rows = file.read_row_group(group, columns=columns)
    tokens = rows["num_tokens"].to_numpy()
    fitting = tokens >= wanted.min_tokens
    if wanted.max_tokens is not None:
        fitting &= tokens <= wanted.max_tokens
    if wanted.source:
        whole = re.compile(fnmatch.translate(wanted.source)).match
        fitting &= [
            source.partition("/")[0] == wanted.source or whole(source) is not None
            for source in rows["source"].to_pylist()
        ]
    if wanted.modalities:
        spans = rows["spans"].combine_chunks()
        owner = pc.list_parent_indices(spans).to_numpy()
        modality = pc.struct_field(spans.flatten(), "modality").to_numpy()
        for asked in wanted.modalities:
            fitting &= np.bincount(owner[modality == asked], minlength=len(fitting)) > 0
    return np.asarray(fitting)


def _row_named(dataset: Dataset, prefix: str) -> StoredRow:
    found: list[tuple[str, int]] = []
    for shard in dataset.shards():
        with open_shard(dataset.storage, shard.name) as file:
            ids = file.read(columns=["row_id"])["row_id"].combine_chunks()
        found += [(shard.name, int(i)) for i in np.flatnonzero(pc.starts_with(ids, prefix).to_numpy(False))]
        if found and len(prefix) == _ROW_ID_DIGITS:
            break
    if not found:
        raise DatasetError(f"{dataset.uri}: no row id begins with {prefix}; `braid show DATASET 0` shows the first row")
    if len(found) > 1:
        raise DatasetError(f"{dataset.uri}: {len(found)} row ids begin with {prefix}; give more of the id")
    name, index = found[0]
    return next(_read(dataset, name, [index]))


def _read(dataset: Dataset, name: str, indices: list[int]) -> Iterator[StoredRow]:
    """Some rows of a shard, ascending, reading their row groups alone."""
    with open_shard(dataset.storage, name) as file:
        before = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            inside = [index - before for index in indices if before <= index < before + rows]
            if inside:
                table: pa.Table = file.read_row_group(group)
                for index in inside:
                    yield StoredRow(shard=name, values=table.slice(index, 1).to_pylist()[0])
            before += rows
    if indices[-1] >= before:
        raise AssertionError(f"{name}: fewer rows than its commit said")
