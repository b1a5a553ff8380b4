"""How sure a figure is that was taken over documents: intervals by the bootstrap.

Enters: for each document a numerator and a denominator. Leaves: an interval of the ratio of their sums. Always holds:
documents are drawn whole, because the tokens of a document are not independent; and equal seeds give equal intervals.

Source: Efron (1979); percentile intervals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
LEVEL = 0.95

_AT_ONCE = 1 << 21
"""Drawn documents in memory."""


def interval(numerator: ArrayLike, denominator: ArrayLike | None = None, *, seed: int) -> list[float] | None:
    """Where 95% of the resampled ratios lie: [low, high].

    Args:
        numerator: [documents].
        denominator: [documents], not negative; documents of 0 do not count. By default 1 each, for a mean.

    Returns:
        None for fewer than two documents, of which nothing can be said.
    """
    top = np.asarray(numerator, np.float64)
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, np.float64)
    held = bottom > 0
    top, bottom = top[held], bottom[held]
    documents = len(top)
    if documents < 2:
        return None
    random = np.random.Generator(np.random.Philox(seed))
    ratios: list[float] = []
    while len(ratios) < RESAMPLES:
        drawn = random.integers(0, documents, (min(RESAMPLES - len(ratios), max(1, _AT_ONCE // documents)), documents))
        ratios += (top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)).tolist()
    outside = (1 - LEVEL) / 2
    return [float(value) for value in np.quantile(ratios, [outside, 1 - outside])]
