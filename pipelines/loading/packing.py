"""Which pieces share a sequence, and in which order the sequences come: planned from lengths alone.

Enters: an `Index`, a seed, an epoch. Leaves: the windows of the epoch, and the packed sequences of a window. A window
is a run of row groups in shuffled order, about `window_tokens` tokens; its pieces are shuffled and packed among
themselves, so that memory stays bounded and a window is planned without the ones before it. Always holds: each piece
lies in exactly one sequence of an epoch, and no sequence is longer than `sequence_length`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.loading.index import Index, Int64s

_BLOCKS, _PIECES, _SEQUENCES = range(3)
"""What is shuffled: keys of independent random streams."""


def permutation(size: int, *key: int) -> Int64s:
    """A random order of `size` things, the same for a key on every machine and in every numpy.

    Raw Philox output is sorted because numpy promises to keep bit generators' streams, but not `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size), kind="stable")


@dataclass(frozen=True, slots=True)
class Plan:
    """The packed sequences of one window."""

    pieces: Int64s
    """[pieces of the window]: indices into the `Index`, sequence by sequence."""
    bounds: Int64s
    """[sequences + 1]: sequence s holds `pieces[bounds[s]:bounds[s + 1]]`."""

    @property
    def sequences(self) -> int:
        return len(self.bounds) - 1


def windows(index: Index, seed: int, epoch: int, window_tokens: int) -> list[Int64s]:
    """The blocks of each window of an epoch; blocks without pieces are left out."""
    bounds = index.block_bounds
    held = np.flatnonzero(np.diff(bounds))
    order = held[permutation(len(held), seed, epoch, _BLOCKS)]
    before = np.concatenate([[0], np.cumsum(index.length, dtype=np.int64)])
    tokens = before[bounds[order + 1]] - before[bounds[order]]
    window = (np.cumsum(tokens) - tokens) // window_tokens
    return np.split(order, np.flatnonzero(np.diff(window)) + 1) if len(order) else []


def plan_window(index: Index, blocks: Int64s, seed: int, epoch: int, window: int) -> Plan:
    """Shuffle and pack the pieces of a window."""
    bounds = index.block_bounds
    pieces = np.concatenate([np.arange(bounds[b], bounds[b + 1]) for b in blocks])
    pieces = pieces[permutation(len(pieces), seed, epoch, _PIECES, window)]
    sequence = best_fit(index.length[pieces], index.sequence_length, index.pieces_per_sequence)
    # The packing fills its first sequences with the longest pieces; training must not see it.
    place = permutation(int(sequence.max()) + 1, seed, epoch, _SEQUENCES, window)[sequence]
    order = np.argsort(place, kind="stable")
    return Plan(pieces[order], np.searchsorted(place[order], np.arange(int(place.max()) + 2)))


def best_fit(lengths: np.ndarray, capacity: int, most: int) -> Int64s:
    """Best-fit-decreasing bin packing (Johnson et al., 1974): at most 11/9 of the fewest sequences, plus a few.

    Args:
        lengths: integer [pieces], each 1 to `capacity`.
        capacity: tokens of a sequence.
        most: pieces of a sequence.

    Returns:
        int64 [pieces]: the sequence of each piece, numbered from 0.
    """
    sequence = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    held: list[int] = []
    # Bit r is set where a sequence has room for r more tokens: the best fit is one shift and one lowest bit away.
    rooms = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            held[chosen] += 1
        else:
            room, chosen = capacity, len(held)
            held.append(1)
        sequence[piece] = chosen
        left = room - length
        if left and held[chosen] < most:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return sequence
