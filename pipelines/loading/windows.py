"""The tokens of one window in memory, laid out as rows of packed sequences.

Enters: a window's row groups and its `Plan`. Leaves: `Rows`. Always holds: a row is its pieces in order and then
padding, which is text that nothing predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.loading.index import Index, Int32s, Int64s
from pipelines.loading.packing import Plan
from pipelines.loading.reading import read_block
from pipelines.sequence import Modality

NO_TARGET = -1
"""Stands for a modality where the next token is nobody's to predict."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed sequences, as arrays [rows, T]."""

    token_ids: Int32s
    modality_ids: NDArray[np.int8]
    positions: Int32s
    """Index of each token in its piece; 0 marks where a piece, or the padding, begins."""
    next_ids: Int32s
    """The token that follows in the document, also where that lies in another piece."""
    next_modality_ids: NDArray[np.int8]
    """Its modality, or `NO_TARGET`."""

    @classmethod
    def allocate(cls, rows: int, sequence_length: int) -> Rows:
        """Rows of anything: every one of them is to be filled or padded."""
        shape = (rows, sequence_length)
        return cls(
            token_ids=np.empty(shape, np.int32),
            modality_ids=np.empty(shape, np.int8),
            positions=np.empty(shape, np.int32),
            next_ids=np.empty(shape, np.int32),
            next_modality_ids=np.empty(shape, np.int8),
        )

    def pad(self, where: Any, padding_id: int, start: int = 0) -> None:
        """Make padding of a row, or of several, from a column on."""
        self.token_ids[where, start:] = padding_id
        self.modality_ids[where, start:] = Modality.TEXT
        self.positions[where, start:] = np.arange(self.positions.shape[1] - start, dtype=np.int32)
        self.next_ids[where, start:] = padding_id
        self.next_modality_ids[where, start:] = NO_TARGET

    def slice(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, sharing memory."""
        return Rows(
            token_ids=self.token_ids[start:stop],
            modality_ids=self.modality_ids[start:stop],
            positions=self.positions[start:stop],
            next_ids=self.next_ids[start:stop],
            next_modality_ids=self.next_modality_ids[start:stop],
        )


class Window:
    """A window's plan, and its decoded tokens once they are needed."""

    def __init__(self, index: Index, blocks: Int64s, plan: Plan) -> None:
        self.plan = plan
        self._index = index
        # In stored order, whatever order they were drawn in: the plan alone says what follows what.
        self._blocks = np.sort(blocks)
        self._length = index.length[plan.pieces].astype(np.int64)

    def load(self) -> Window:
        """Read and decode now what would otherwise be read when it is needed."""
        _ = self._tokens
        return self

    def tokens(self, start: int, stop: int) -> int:
        """Tokens in sequences `start` to `stop`, without padding."""
        bounds = self.plan.bounds
        return int(self._length[bounds[start] : bounds[stop]].sum())

    def fill(self, rows: Rows, numbers: Int64s, start: int, stop: int, padding_id: int) -> None:
        """Write sequences `start` to `stop` of the plan into the rows of these numbers, and padding behind them."""
        bounds = self.plan.bounds[start : stop + 1]
        pieces = slice(int(bounds[0]), int(bounds[-1]))
        token_ids, modality_ids = self._tokens.take(pieces)
        length = self._length[pieces]
        ends = np.cumsum(length)
        positions = np.arange(len(token_ids), dtype=np.int32)
        positions -= np.repeat((ends - length).astype(np.int32), length)
        next_ids, next_modality_ids = np.empty_like(token_ids), np.empty_like(modality_ids)
        next_ids[:-1], next_modality_ids[:-1] = token_ids[1:], modality_ids[1:]
        next_ids[ends - 1], next_modality_ids[ends - 1] = self._tokens.after(pieces)
        edges = np.concatenate([[0], ends])[bounds - bounds[0]].tolist()
        for number, low, high in zip(numbers.tolist(), edges[:-1], edges[1:], strict=True):
            size = high - low
            rows.token_ids[number, :size] = token_ids[low:high]
            rows.modality_ids[number, :size] = modality_ids[low:high]
            rows.positions[number, :size] = positions[low:high]
            rows.next_ids[number, :size] = next_ids[low:high]
            rows.next_modality_ids[number, :size] = next_modality_ids[low:high]
            rows.pad(number, padding_id, size)

    @cached_property
    def _tokens(self) -> _Tokens:
        return _Tokens(self._index, self._blocks, self.plan.pieces)


class _Tokens:
    """The tokens of the pieces of a plan, which can be taken in any order.

    Pieces are taken as Arrow's binary values are: one copy of memory for each, which is three times as fast as gathering
    tokens by their indices.
    """

    def __init__(self, index: Index, blocks: Int64s, pieces: Int64s) -> None:
        total = sum(index.blocks[b].tokens for b in blocks)
        # Copied block by block, because memory that a block leaves is used again by the next: holding all of them takes
        # twice as long.
        token_ids, modality_ids = np.empty(total, np.int32), np.empty(total, np.int8)
        documents: list[Int64s] = []
        at = 0
        for b in blocks:
            block = read_block(index, index.blocks[b])
            here = slice(at, at + len(block.token_ids))
            token_ids[here], modality_ids[here] = block.token_ids, block.modality_ids
            documents.append(block.offsets[:-1] + at)
            at = here.stop
        document = np.concatenate(documents)
        """Where each row of the blocks begins in the tokens."""
        first_row = np.zeros(len(index.blocks), np.int64)
        rows = np.array([index.blocks[b].rows for b in blocks], np.int64)
        first_row[blocks] = np.cumsum(rows) - rows
        stored = np.sort(pieces)
        begin = document[first_row[index.block[stored]] + index.row[stored]] + index.start[stored]
        end = begin + index.length[stored]
        # Values 0, 2, 4 ... are the pieces, those between them what the split leaves out.
        bounds = np.stack([begin, end], axis=1).reshape(-1)
        self._token_ids = _binary(token_ids, bounds)
        self._modality_ids = _binary(modality_ids, bounds)
        place = np.searchsorted(stored, pieces)
        self._values = pa.array(2 * place)
        # What follows a piece in its document: the first token of the next piece, or nothing.
        following = np.minimum(end, len(token_ids) - 1)
        self._next_id = token_ids[following][place]
        self._next_modality = np.where(index.ends[stored], np.int8(NO_TARGET), modality_ids[following])[place]

    def take(self, pieces: slice) -> tuple[Int32s, NDArray[np.int8]]:
        """(token_ids, modality_ids) of pieces of the plan, end to end."""
        values = self._values[pieces]
        return _content(self._token_ids.take(values), np.int32), _content(self._modality_ids.take(values), np.int8)

    def after(self, pieces: slice) -> tuple[Int32s, NDArray[np.int8]]:
        """(id, modality) of the token that follows each piece; the modality is `NO_TARGET` where the document ends."""
        return self._next_id[pieces], self._next_modality[pieces]


def _binary(values: NDArray[np.generic], bounds: Int64s) -> pa.Array:
    """The ranges between ascending bounds of an array, as Arrow values."""
    offsets = pa.py_buffer(bounds * values.itemsize)
    return pa.Array.from_buffers(pa.large_binary(), len(bounds) - 1, [None, offsets, pa.py_buffer(values)])


def _content(values: pa.Array, kind: type[np.generic]) -> Any:
    _, _, data = values.buffers()
    return np.frombuffer(data, kind)
