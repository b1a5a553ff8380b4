"""The tokens of one window in memory, laid out as rows of packed sequences.

Enters: a window's row groups and its `Plan`. Leaves: `Rows`. Always holds: a row is its pieces in order and then
padding, which is text that nothing predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.loading.index import Block, Index, Int32s, Int64s
from pipelines.loading.packing import Plan
from pipelines.sequence import Modality
from pipelines.shards.reader import open_shard

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
    def empty(cls, rows: int, sequence_length: int, padding_id: int) -> Rows:
        """Rows of nothing but padding."""
        shape = (rows, sequence_length)
        padding = np.full(shape, padding_id, np.int32)
        return cls(
            token_ids=padding,
            modality_ids=np.full(shape, Modality.TEXT, np.int8),
            positions=np.tile(np.arange(sequence_length, dtype=np.int32), (rows, 1)),
            next_ids=padding,
            next_modality_ids=np.full(shape, NO_TARGET, np.int8),
        )

    def slice(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`, sharing memory."""
        return Rows(
            token_ids=self.token_ids[start:stop],
            modality_ids=self.modality_ids[start:stop],
            positions=self.positions[start:stop],
            next_ids=self.next_ids[start:stop],
            next_modality_ids=self.next_modality_ids[start:stop],
        )

    @classmethod
    def concatenate(cls, parts: list[Rows]) -> Rows:
        """All rows of the parts in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            modality_ids=np.concatenate([part.modality_ids for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
            next_ids=np.concatenate([part.next_ids for part in parts]),
            next_modality_ids=np.concatenate([part.next_modality_ids for part in parts]),
        )


class Window:
    """The decoded tokens of a window with its plan."""

    def __init__(self, index: Index, blocks: Int64s, plan: Plan) -> None:
        self.plan = plan
        self._sequence_length = T = index.sequence_length
        rows = [index.blocks[b].rows for b in blocks]
        self._padding_at = total = sum(index.blocks[b].tokens for b in blocks)
        # T tokens of padding stand at the end, so that padding is gathered like any other piece.
        self._token_ids = np.full(total + T, index.dataset.vocabulary.end, np.int32)
        self._modality_ids = np.full(total + T, Modality.TEXT, np.int8)
        document = np.empty(sum(rows), np.int64)
        """Where each row of the window's blocks begins in its tokens."""
        first_row = np.zeros(len(index.blocks), np.int64)
        first_row[blocks] = np.cumsum(rows) - rows
        at = 0
        for b in blocks:
            token_ids, modality_ids, offsets = _read(index, index.blocks[b])
            self._token_ids[at : at + len(token_ids)] = token_ids
            self._modality_ids[at : at + len(token_ids)] = modality_ids
            document[first_row[b] : first_row[b] + len(offsets) - 1] = offsets[:-1] + at
            at += len(token_ids)
        pieces = plan.pieces
        self._source = document[first_row[index.block[pieces]] + index.row[pieces]] + index.start[pieces]
        """Where each piece of the plan begins in the window's tokens."""
        self._length = index.length[pieces].astype(np.int64)
        self._ends = index.ends[pieces]

    def tokens(self, start: int, stop: int) -> int:
        """Tokens in sequences `start` to `stop`, without padding."""
        bounds = self.plan.bounds
        return int(self._length[bounds[start] : bounds[stop]].sum())

    def rows(self, start: int, stop: int) -> Rows:
        """Sequences `start` to `stop` of the plan."""
        T, count = self._sequence_length, stop - start
        bounds = self.plan.bounds[start : stop + 1]
        pieces = slice(int(bounds[0]), int(bounds[-1]))
        row = np.repeat(np.arange(count), np.diff(bounds))
        filled = np.bincount(row, weights=self._length[pieces], minlength=count).astype(np.int64)
        padded = np.flatnonzero(filled < T)
        # Padding becomes one more piece at the end of its row.
        after = bounds[padded + 1] - bounds[0]
        length = np.insert(self._length[pieces], after, T - filled[padded])
        source = np.insert(self._source[pieces], after, self._padding_at)
        ends = np.insert(self._ends[pieces], after, True)
        into = np.cumsum(length) - length

        flat = np.arange(count * T, dtype=np.int32)
        gather = flat + np.repeat((source - into).astype(np.int32), length)
        token_ids = self._token_ids[gather]
        modality_ids = self._modality_ids[gather]
        next_ids, next_modality_ids = np.empty_like(token_ids), np.empty_like(modality_ids)
        next_ids[:-1], next_modality_ids[:-1] = token_ids[1:], modality_ids[1:]
        last = into + length - 1
        following = np.minimum(source + length, len(self._token_ids) - 1)
        next_ids[last] = self._token_ids[following]
        next_modality_ids[last] = np.where(ends, NO_TARGET, self._modality_ids[following])
        for r in padded:
            next_modality_ids[r * T + filled[r] : (r + 1) * T] = NO_TARGET
        positions = flat - np.repeat(into.astype(np.int32), length)
        return Rows(
            token_ids=token_ids.reshape(count, T),
            modality_ids=modality_ids.reshape(count, T),
            positions=positions.reshape(count, T),
            next_ids=next_ids.reshape(count, T),
            next_modality_ids=next_modality_ids.reshape(count, T),
        )


def _read(index: Index, block: Block) -> tuple[Int32s, NDArray[np.int8], Int64s]:
    """(token_ids, modality_ids, offsets [rows + 1]) of a row group, page checksums verified."""
    with open_shard(index.dataset.storage, block.shard) as file:
        table = file.read_row_group(block.row_group, columns=["token_ids", "modality_ids"], use_threads=False)
    tokens: pa.ListArray = table["token_ids"].combine_chunks()
    modalities: pa.ListArray = table["modality_ids"].combine_chunks()
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    return tokens.flatten().to_numpy(), modalities.flatten().to_numpy(), offsets - offsets[0]
