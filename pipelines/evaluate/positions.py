"""Loss by where in its span a token stands: pieces of a text, codes of a picture in raster order, frames of a sound.

Enters: spans of scored documents. Leaves: mean losses by bin of positions, beside those of the unigram. Always holds: every
code and piece counts in one bin, special tokens in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.report.histogram import edges
from pipelines.sequence import Modality, Span, Vocabulary
from pipelines.shards.statistics import Statistics


class Positions:
    """Sums by modality and bin."""

    def __init__(self, vocabulary: Vocabulary, statistics: Statistics) -> None:
        """
        Args:
            statistics: of the whole version: the longest spans decide the bins.
        """
        stored_codebooks = max(len(statistics.audio_counts), 1)
        self._edges: dict[Modality, NDArray[np.int64]] = {}
        for modality in Modality:
            longest = max(statistics.span_lengths[modality.label], default=1)
            if modality is Modality.AUDIO:
                longest = -(-longest // stored_codebooks)
            self._edges[modality] = np.array(edges(0, max(longest, 1) - 1))
        bins = {m: len(e) - 1 for m, e in self._edges.items()}
        self._sums = {m: np.zeros(bins[m]) for m in Modality}
        self._tokens = {m: np.zeros((bins[m], vocabulary.size(m)), np.int64) for m in Modality}
        """[bins, ids]: how often each id is a target."""

    def add(self, span: Span, ids: NDArray[np.int32], losses: NDArray[np.float32]) -> None:
        """Count one span."""
        at = np.arange(span.length)
        if span.modality is Modality.AUDIO:
            at = at // span.columns
        placed = self._edges[span.modality]
        # A roll-up knows long lengths to within 0.025%, so the last bin takes what is a little longer.
        bins = np.minimum(np.searchsorted(placed, at, side="right") - 1, len(placed) - 2)
        sums = self._sums[span.modality]
        sums += np.bincount(bins, weights=losses, minlength=len(sums))
        np.add.at(self._tokens[span.modality], (bins, ids), 1)

    def table(self, modality: Modality, unigram: Sequence[NDArray[np.float64]]) -> list[dict[str, Any]]:
        """The bins that hold any token, ascending.

        Args:
            unigram: log probability of each id of the modality; of audio one array a codebook.
        """
        tokens, placed = self._tokens[modality], self._edges[modality]
        counts = tokens.sum(axis=1)
        baseline = -(tokens @ np.concatenate(unigram)) if tokens.size else np.zeros(len(counts))
        return [
            {
                "low": int(placed[b]),
                "high": int(placed[b + 1]) - 1,
                "targets": int(counts[b]),
                "loss": float(self._sums[modality][b] / counts[b]),
                "unigram": float(baseline[b] / counts[b]),
            }
            for b in np.flatnonzero(counts).tolist()
        ]
