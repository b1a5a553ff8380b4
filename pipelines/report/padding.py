"""How much of a training batch would be padding, at several sequence lengths.

Enters: how many documents have each length. Leaves: shares. Always holds: the packed figure is made by the loader's own
packing, over a sample of the documents if there are many; it is an estimate in that pieces are cut anywhere, where the loader
does not cut pictures and sounds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.loading.packing import best_fit

_SAMPLE = 20_000
"""Pieces that are packed to estimate."""

_USUAL = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """What happens at one sequence length."""

    sequence_length: int
    cut: float
    """Share of the documents that are longer, and so become several pieces."""
    separate: float
    """Share of padding if each piece had a sequence of its own."""
    packed: float
    """Share of padding as the loader packs them."""


def lengths_to_ask(sequence_length: int | None) -> list[int]:
    """The recipe's own sequence length and the usual ones."""
    return sorted({*_USUAL, *([sequence_length] if sequence_length else [])})


def expected_padding(lengths: Counter[int], sequence_length: int) -> Padding:
    """Estimate the padding of documents of these lengths.

    Args:
        lengths: documents by number of tokens, at least one.
    """
    values = np.array(sorted(lengths), np.int64)
    counts = np.array([lengths[int(v)] for v in values], np.int64)
    pieces = -(-values // sequence_length)
    sample = _pieces(_sample(values, counts), sequence_length)
    short = int(np.quantile(sample, 0.05, method="lower"))
    sequences = int(best_fit(sample, sequence_length, -(-sequence_length // short)).max()) + 1
    tokens, documents = int((values * counts).sum()), int(counts.sum())
    return Padding(
        sequence_length=sequence_length,
        cut=int(counts[values > sequence_length].sum()) / documents,
        separate=1 - tokens / (int((pieces * counts).sum()) * sequence_length),
        packed=1 - int(sample.sum()) / (sequences * sequence_length),
    )


def _sample(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """All lengths, or those at evenly spread ranks."""
    ends = np.cumsum(counts)
    total = int(ends[-1])
    ranks = np.arange(total) if total <= _SAMPLE else (np.arange(_SAMPLE) * total + total // 2) // _SAMPLE
    return values[np.searchsorted(ends, ranks, side="right")]


def _pieces(lengths: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    whole, rest = np.divmod(lengths, sequence_length)
    # What is packed besides full sequences is what matters; but full ones are without padding and count too.
    return np.concatenate([np.full(int(whole.sum()), sequence_length), rest[rest > 0]])
