"""Sums over scored documents, from which all figures of losses are made.

Enters: documents with their `Scores`. Leaves: counts and sums by modality and audio codebook, and by document. Always holds:
the groups are those of `pipelines.pretrain.validate`, [text, image, audio codebook 0, audio codebook 1, ...], and so are
the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.calibration import Calibration
from pipelines.evaluate.documents import Document
from pipelines.evaluate.positions import Positions
from pipelines.evaluate.scoring import Scores
from pipelines.pretrain.validate import CrossEntropy, TokenCounts
from pipelines.sequence import Ids, Modality, Vocabulary
from pipelines.shards.statistics import Statistics

WITHIN = (1, 5)
"""Accuracy is told for the so many likeliest tokens."""


def groups_of(modality: Modality) -> slice:
    """Which groups are a modality's."""
    return slice(2, None) if modality is Modality.AUDIO else slice(modality, modality + 1)


class OfDocument(NamedTuple):
    """What one document adds to the figures; losses are sums in nats."""

    text: float
    text_targets: int
    image: float
    image_targets: int
    audio: float
    audio_targets: int
    pieces: float
    """Loss of the text pieces, without special tokens."""
    bytes: int
    """Of the decoded texts, in UTF-8."""
    images: int
    seconds: float


class Tally:
    """Adds up scored documents."""

    def __init__(
        self, vocabulary: Vocabulary, statistics: Statistics, decode: Callable[[Ids], str], frame_rate_hz: float
    ) -> None:
        """
        Args:
            statistics: of the whole version.
            decode: pieces of a text to the text.
            frame_rate_hz: frames a second of the audio tokenizer; unread without one.
        """
        v = vocabulary
        self.vocabulary = v
        self.groups = 2 + v.audio_codebooks
        self.counts = np.zeros(self.groups, np.int64)
        self.sums = np.zeros(self.groups)
        self.within = {k: np.zeros(self.groups, np.int64) for k in WITHIN}
        """Targets among the k tokens that the model held for likeliest."""
        self.calibration = Calibration(self.groups)
        self.positions = Positions(v, statistics)
        self.documents: list[OfDocument] = []
        self._tokens = {m: np.zeros(v.size(m), np.int64) for m in Modality}
        self._decode, self._frame_rate_hz = decode, frame_rate_hz

    def add(self, document: Document, scores: Scores) -> None:
        """Count one document."""
        ids, kinds = document.sequence.token_ids[1:], document.sequence.modality_ids[1:]
        losses, ranks, confidences = scores.losses[1:], scores.ranks[1:], scores.confidences[1:]
        groups: NDArray[np.int64] = kinds.astype(np.int64)
        audio = kinds == Modality.AUDIO
        if audio.any():
            groups[audio] += ids[audio] // self.vocabulary.audio_codebook_size
        counts = np.bincount(groups, minlength=self.groups)
        sums = np.bincount(groups, weights=losses.astype(np.float64), minlength=self.groups)
        self.counts += counts
        self.sums += sums
        for k, right in self.within.items():
            right += np.bincount(groups[ranks < k], minlength=self.groups)
        self.calibration.add(groups, confidences, ranks == 0)
        for modality in Modality:
            np.add.at(self._tokens[modality], ids[kinds == modality], 1)
        pieces, size, images, seconds = 0.0, 0, 0, 0.0
        for span in document.sequence.spans:
            here = slice(span.start, span.start + span.length)
            own_ids, own = document.sequence.token_ids[here], scores.losses[here]
            self.positions.add(span, own_ids, own)
            if span.modality is Modality.TEXT:
                pieces += float(own.sum(dtype=np.float64))
                size += len(self._decode(own_ids).encode("utf-8", "replace"))
            elif span.modality is Modality.IMAGE:
                images += 1
            else:
                seconds += span.rows / self._frame_rate_hz
        audio_groups = groups_of(Modality.AUDIO)
        self.documents.append(
            OfDocument(
                text=float(sums[Modality.TEXT]),
                text_targets=int(counts[Modality.TEXT]),
                image=float(sums[Modality.IMAGE]),
                image_targets=int(counts[Modality.IMAGE]),
                audio=float(sums[audio_groups].sum()),
                audio_targets=int(counts[audio_groups].sum()),
                pieces=pieces,
                bytes=size,
                images=images,
                seconds=seconds,
            )
        )

    @property
    def cross_entropy(self) -> CrossEntropy:
        """What validation would say of the same documents."""
        return CrossEntropy.of(self.sums, self.counts)

    @property
    def token_counts(self) -> TokenCounts:
        """How often each token was a target."""
        v = self.vocabulary
        audio = self._tokens[Modality.AUDIO].reshape(v.audio_codebooks, v.audio_codebook_size)
        return TokenCounts(self._tokens[Modality.TEXT], self._tokens[Modality.IMAGE], audio)

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of all documents, float64 [documents]."""
        return np.array([getattr(row, name) for row in self.documents], np.float64)
