"""Two spans of one document that say the same in two modalities: a caption and its picture, a voice and its words.

Enters: documents. Leaves: `Pair`s by direction, at most so many, drawn by a seed. Always holds: a pair fits the checkpoint's
context, and its shuffled partner has other content.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from pipelines.evaluate.documents import Document
from pipelines.interleave import EncodedSpan, extract, sequence_length
from pipelines.sequence import Modality, Vocabulary

LONGEST_CAPTION = 256
"""Pieces of a text that counts as a caption."""

MOST_PAIRS = 256
"""Of each direction."""

Direction = tuple[Modality, Modality]
"""What is given, and what is to be predicted."""

DIRECTIONS: tuple[Direction, ...] = tuple(permutations(Modality, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One span, and the nearest one of another modality in the same document."""

    document: Document
    given: EncodedSpan
    predicted: EncodedSpan
    at: int
    """Index of `predicted` among the spans of the document."""


class Pairs:
    """Keeps pairs of each direction, drawn from all documents that are shown."""

    def __init__(self, vocabulary: Vocabulary, context: int, seed: int, most: int = MOST_PAIRS) -> None:
        """
        Args:
            context: the most tokens that a document of a pair may have.
        """
        self._vocabulary, self._context, self._seed, self._most = vocabulary, context, seed, most
        self._held: dict[Direction, list[tuple[float, int, Pair]]] = {direction: [] for direction in DIRECTIONS}

    def add(self, document: Document) -> None:
        """Show a document."""
        # By its number, not by the order of drawing: the same documents are drawn for every direction.
        lot = random.Random(f"{self._seed} {document.number}").random()
        for direction, held in self._held.items():
            if len(held) == self._most and -lot <= held[0][0]:
                continue
            pair = self._pair(document, *direction)
            if pair is not None:
                entry = (-lot, document.number, pair)
                if len(held) < self._most:
                    heapq.heappush(held, entry)
                else:
                    heapq.heapreplace(held, entry)

    def of(self, direction: Direction) -> list[Pair]:
        """The pairs of a direction, in the order of drawing."""
        return [pair for *_, pair in sorted(self._held[direction], key=lambda entry: -entry[0])]

    def _pair(self, document: Document, given: Modality, predicted: Modality) -> Pair | None:
        spans = document.sequence.spans
        at = next((i for i, span in enumerate(spans) if span.modality is predicted), None)
        sources = [i for i, span in enumerate(spans) if span.modality is given]
        if at is None or not sources:
            return None
        nearest = min(sources, key=lambda i: abs(i - at))
        captions = [spans[i].length for i in (at, nearest) if spans[i].modality is Modality.TEXT]
        first, second = (extract(self._vocabulary, document.sequence.token_ids, spans[i]) for i in (nearest, at))
        if max(captions, default=0) > LONGEST_CAPTION or sequence_length([first, second]) > self._context:
            return None
        return Pair(document=document, given=first, predicted=second, at=at)


def shuffled(pairs: Sequence[Pair], context: int) -> list[int | None]:
    """For each pair the index of another one whose given span is shown in place of its own.

    Args:
        pairs: in a random order: the partner is the next one that differs.

    Returns:
        None where no other pair has different content that fits.
    """
    contents = [(pair.given.codes.shape, pair.given.codes.tobytes()) for pair in pairs]

    def partner(i: int) -> int | None:
        for j in _after(i, len(pairs)):
            if contents[j] != contents[i] and sequence_length([pairs[j].given, pairs[i].predicted]) <= context:
                return j
        return None

    return [partner(i) for i in range(len(pairs))]


def _after(i: int, size: int) -> Iterator[int]:
    return ((i + step) % size for step in range(1, size))
