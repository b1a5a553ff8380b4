"""Which rows of a dataset version repeat the content of another row.

Enters: the columns `content_hash` and, where hashes repeat, `row_id`. Leaves: which rows are copies. Always holds: of the
rows of one content the one with the smallest row id is no copy, and all others are, in whatever order they were
tokenized and committed; and memory holds under 30 bytes a row, and some 100 more for each that has a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.shards.reader import open_shard
from pipelines.shards.storage import Storage

if TYPE_CHECKING:
    from pipelines.loading.index import Block

_DIGITS = 32
"""Of a content hash and of a row id."""


def copies(dataset: Storage, blocks: list[Block]) -> NDArray[np.bool_]:
    """bool [rows of all blocks]: whether a row has the content of one with a smaller row id."""
    first = np.concatenate([[0], np.cumsum([block.rows for block in blocks], dtype=np.int64)])
    # Half of each hash finds nearly all rows that have no copy, in half the memory.
    halves = np.empty(first[-1], np.uint64)
    for number, table in _tables(dataset, enumerate(blocks), ["content_hash"]):
        hashes = table["content_hash"].to_pylist()
        halves[first[number] : first[number + 1]] = np.frombuffer(bytes.fromhex("".join(h[:16] for h in hashes)), ">u8")
    result = np.zeros(len(halves), np.bool_)
    suspects = _repeated(halves)
    del halves
    if not len(suspects):
        return result
    bounds = np.searchsorted(suspects, first)
    held = ((number, block) for number, block in enumerate(blocks) if bounds[number] < bounds[number + 1])
    contents, row_ids = (np.empty(len(suspects), f"S{_DIGITS}") for _ in range(2))
    for number, table in _tables(dataset, held, ["content_hash", "row_id"]):
        here = slice(bounds[number], bounds[number + 1])
        chosen = table.take(suspects[here] - first[number])
        contents[here], row_ids[here] = chosen["content_hash"].to_pylist(), chosen["row_id"].to_pylist()
    order = np.lexsort((row_ids, contents))
    repeats = contents[order[1:]] == contents[order[:-1]]
    result[suspects[order[1:][repeats]]] = True
    return result


def _repeated(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64: where the values stand that occur more than once, ascending."""
    order = np.argsort(values, kind="stable")
    equal = values[order[1:]] == values[order[:-1]]
    among = np.zeros(len(values), np.bool_)
    among[order[1:][equal]] = among[order[:-1][equal]] = True
    return np.flatnonzero(among)


def _tables(
    dataset: Storage, blocks: Iterable[tuple[int, Block]], columns: list[str]
) -> Iterator[tuple[int, pa.Table]]:
    """The columns of each numbered block; each shard is opened once."""
    for shard, group in groupby(blocks, key=lambda item: item[1].shard):
        with open_shard(dataset, shard) as file:
            for number, block in group:
                yield number, file.read_row_group(block.row_group, columns=columns, use_threads=False)
