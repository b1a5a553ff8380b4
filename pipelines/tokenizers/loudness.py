"""The loudness of a segment as a code, for models that hear every segment at one level.

Enters: root mean squares, 0 and up. Leaves: codes in [0, codebook_size), equal steps of dB, and gains back from them. The 48
kHz model of EnCodec divides each second by its RMS and keeps that number beside the codes; without it a pause would come back
as loud noise. As a codebook of its own, first of all, it needs no other place in a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR_DB, RANGE_DB = -100.0, 102.4
"""Of full scale. With 1,024 codes a step is 0.1 dB, which nobody hears; below -100 dB is silence."""


def loudness_codes(rms: Tensor, codebook_size: int) -> Tensor:
    """Codes of root mean squares, float32 of any shape -> int64 of the same."""
    decibels = 20 * torch.log10(rms.clamp_min(1e-9))
    return ((decibels - FLOOR_DB) * (codebook_size / RANGE_DB)).round().long().clamp(0, codebook_size - 1)


def loudness_gains(codes: Tensor, codebook_size: int) -> Tensor:
    """Root mean squares of codes, int64 of any shape -> float32 of the same; a step off by half at the most."""
    return 10 ** ((codes * (RANGE_DB / codebook_size) + FLOOR_DB) / 20)
