"""How far a generated picture, text or sound is from another one.

Enters: decoded spans, or codes. Leaves: distances, 0 for equal ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.tokenizers.audio_evaluation import log_mel_db

THUMBNAIL = 32
"""Pictures are compared at so many pixels a side, so that a shift by a pixel does not count, and any shape compares."""


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """uint8 [H, W, 3] to [32, 32, 3] in 0..1, each the mean of what it covers."""
    from PIL import Image

    small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def pixel_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Root mean square difference of two thumbnails, 0 to 1."""
    return float(np.sqrt(np.square(a - b).mean()))


def code_distance(a: NDArray[np.int32], b: NDArray[np.int32]) -> float:
    """Share of the codes that differ, 0 to 1; 1 for pictures of different shapes."""
    return float((a != b).mean()) if a.shape == b.shape else 1.0


def mel_spectrum(waveform: NDArray[np.float32], sample_rate_hz: int) -> NDArray[np.float64]:
    """[frames, 80]: mel spectrum in dB."""
    return log_mel_db(np.ascontiguousarray(waveform, np.float32), sample_rate_hz).T.astype(np.float64)


def mel_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Mean absolute difference in dB along the best alignment of two mel spectra, so that a slower voice is no fault.

    Dynamic time warping (Sakoe and Chiba, 1978) with steps of one frame in either or both; the mean is over the steps.
    """
    cost = np.abs(a[:, None, :] - b[None, :, :]).mean(axis=-1)
    rows, columns = cost.shape
    # total[i, j] and steps[i, j], held by diagonals, on each of which all entries are independent.
    total = np.full((rows + 1, columns + 1), np.inf)
    steps = np.zeros((rows + 1, columns + 1), np.int64)
    total[0, 0] = 0.0
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        taken = before.argmin(axis=0)
        counts = np.stack([steps[i - 1, j - 1], steps[i - 1, j], steps[i, j - 1]])
        total[i, j] = before[taken, np.arange(len(i))] + cost[i - 1, j - 1]
        steps[i, j] = counts[taken, np.arange(len(i))] + 1
    return float(total[rows, columns] / steps[rows, columns])


def edit_distance(a: str, b: str) -> float:
    """Characters to insert, delete or replace (Levenshtein, 1966), as a share of the longer text; 0 for two empty ones."""
    if not a or not b:
        return float(bool(a or b))
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        current = [i]
        for j, right in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1] / max(len(a), len(b))
