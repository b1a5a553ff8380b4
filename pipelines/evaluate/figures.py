"""From sums to what is told: losses, bits, accuracy and calibration by modality, each beside the smoothed unigram.

Enters: a `Tally`, and the statistics of the version. Leaves: JSON values, as docs/evaluate.schema.json describes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.bootstrap import interval
from pipelines.evaluate.calibration import BINS
from pipelines.evaluate.tally import WITHIN, Tally, groups_of
from pipelines.pretrain.validate import CrossEntropy
from pipelines.sequence import Modality

Unigram = Sequence[NDArray[np.float64]]
"""Log probabilities by group, of `pipelines.pretrain.baseline.unigram`."""

_LARGEST_EXPONENT = 700.0


def modality_figures(tally: Tally, unigram: Unigram, seed: int) -> dict[str, Any]:
    """Figures of each modality that has targets; null for the others."""
    return {m.label: _modality(tally, m, unigram, seed) if _targets(tally, m) else None for m in Modality}


def reliability(tally: Tally) -> dict[str, Any]:
    """Bins of confidence by modality."""
    return {m.label: tally.calibration.table(groups_of(m)) for m in Modality}


def by_position(tally: Tally, unigram: Unigram) -> dict[str, Any]:
    """Loss by position in the span, by modality."""
    return {m.label: tally.positions.table(m, unigram[groups_of(m)]) for m in Modality}


def _targets(tally: Tally, modality: Modality) -> int:
    return int(tally.counts[groups_of(modality)].sum())


def _modality(tally: Tally, modality: Modality, unigram: Unigram, seed: int) -> dict[str, Any]:
    name = modality.label
    loss = dict(tally.cross_entropy.items())
    baseline = dict(_baseline(tally, unigram).items())
    figures = _group(tally, groups_of(modality), loss[name], baseline[name], unigram)
    losses, targets = tally.column(name), tally.column(f"{name}_targets")
    figures["loss_interval"] = interval(losses, targets, seed=seed)
    figures["bits"] = _bits(tally, modality, unigram, seed)
    if modality is Modality.AUDIO:
        figures["codebooks"] = [
            _group(tally, slice(2 + q, 3 + q), loss[f"audio/{q}"], baseline[f"audio/{q}"], unigram)
            for q in range(tally.vocabulary.audio_codebooks)
            if f"audio/{q}" in loss
        ]
    return figures


def _baseline(tally: Tally, unigram: Unigram) -> CrossEntropy:
    held = tally.token_counts.groups()
    sums = [float(-(counts * log_p).sum()) for counts, log_p in zip(held, unigram, strict=True)]
    return CrossEntropy.of(np.array(sums), tally.counts)


def _group(tally: Tally, groups: slice, loss: float, baseline: float, unigram: Unigram) -> dict[str, Any]:
    targets = int(tally.counts[groups].sum())
    guessed, error = _guesses(tally.token_counts.groups()[groups], unigram[groups])
    return {
        "targets": targets,
        "loss": loss,
        "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
        "accuracy": {str(k): int(tally.within[k][groups].sum()) / targets for k in WITHIN},
        "calibration_error": tally.calibration.error(groups),
        "unigram": {
            "loss": baseline,
            "perplexity": math.exp(min(baseline, _LARGEST_EXPONENT)),
            "accuracy": {str(k): count / targets for k, count in guessed.items()},
            "calibration_error": error / targets,
        },
    }


def _guesses(held: Sequence[NDArray[np.int64]], unigram: Unigram) -> tuple[dict[int, int], float]:
    """How many targets the k most frequent tokens hit, and the unigram's calibration error times the targets."""
    hits = dict.fromkeys(WITHIN, 0)
    # It is always as sure as the most frequent token of the codebook is frequent.
    gaps = np.zeros(BINS)
    for counts, log_p in zip(held, unigram, strict=True):
        best = np.argsort(-log_p, kind="stable")
        for k in WITHIN:
            hits[k] += int(counts[best[:k]].sum())
        sure = math.exp(log_p[best[0]])
        gaps[min(int(sure * BINS), BINS - 1)] += counts[best[0]] - sure * counts.sum()
    return hits, float(np.abs(gaps).sum())


def _bits(tally: Tally, modality: Modality, unigram: Unigram, seed: int) -> dict[str, Any] | None:
    """Bits for what a person would count: a byte of text, a picture, a second of sound. Opening tokens are not in it."""
    per, column, unit = {
        Modality.TEXT: ("byte", "pieces", "bytes"),
        Modality.IMAGE: ("image", "image", "images"),
        Modality.AUDIO: ("second", "audio", "seconds"),
    }[modality]
    nats, units = tally.column(column), tally.column(unit)
    if not units.sum():
        return None
    groups = groups_of(modality)
    held, log_p = tally.token_counts.groups()[groups], unigram[groups]
    pieces = tally.vocabulary.text_pieces if modality is Modality.TEXT else None
    baseline = sum(float(-(c[:pieces] * p[:pieces]).sum()) for c, p in zip(held, log_p, strict=True))
    told = interval(nats / math.log(2), units, seed=seed)
    return {
        "per": per,
        "units": float(units.sum()),
        "value": float(nats.sum() / math.log(2) / units.sum()),
        "interval": told,
        "unigram": baseline / math.log(2) / float(units.sum()),
    }
