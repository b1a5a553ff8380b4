"""Whether a model is as sure as it is right: reliability and expected calibration error.

Enters: for each target the probability of the likeliest token, and whether that one was right. Leaves: bins of equal width,
and the error. Always holds: bins of several groups add up to those of all of them.

Source: Guo et al. (2017), with 15 bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15


class Calibration:
    """Counts by group and bin of confidence."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._counts = np.zeros((groups, BINS), np.int64)
        self._right = np.zeros((groups, BINS), np.int64)
        self._confidence = np.zeros((groups, BINS))

    def add(self, groups: NDArray[np.int64], confidences: NDArray[np.float32], right: NDArray[np.bool_]) -> None:
        """Count targets, each array [targets]."""
        bins = np.minimum((confidences * BINS).astype(np.int64), BINS - 1)
        slot = groups * BINS + bins
        shape, size = (self._groups, BINS), self._groups * BINS
        self._counts += np.bincount(slot, minlength=size).reshape(shape)
        self._right += np.bincount(slot[right], minlength=size).reshape(shape)
        self._confidence += np.bincount(slot, weights=confidences, minlength=size).reshape(shape)

    def error(self, groups: slice) -> float:
        """Mean distance of confidence and accuracy over the bins, weighted by their targets; of at least one target."""
        counts = self._counts[groups].sum(axis=0)
        gaps = np.abs(self._confidence[groups].sum(axis=0) - self._right[groups].sum(axis=0))
        return float(gaps.sum() / counts.sum())

    def table(self, groups: slice) -> list[dict[str, Any]]:
        """The bins that hold any target, ascending."""
        counts = self._counts[groups].sum(axis=0)
        confidence, right = self._confidence[groups].sum(axis=0), self._right[groups].sum(axis=0)
        return [
            {
                "low": b / BINS,
                "high": (b + 1) / BINS,
                "targets": int(counts[b]),
                "confidence": float(confidence[b] / counts[b]),
                "accuracy": float(right[b] / counts[b]),
            }
            for b in np.flatnonzero(counts).tolist()
        ]
