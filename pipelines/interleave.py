"""Codes of a document to its token sequence, and the exact inverse.

Enters: an `EncodedDocument`, pieces of text ids, image codes [rows, columns] and audio codes [frames, K]. Leaves:
`token_ids`, `modality_ids` and `spans` by the contract of `pipelines.sequence`. Always holds: `deinterleave` gives back
exactly what `interleave` was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.sequence import Ids, Modality, ModalityIds, SequenceError, Span, Vocabulary, parse

MEDIA_OPENING = 3
"""Special tokens in front of the codes of a media span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSpan:
    """One piece of a document after its tokenizer."""

    modality: Modality
    codes: NDArray[np.int32]
    """Text: [pieces]. Image: [rows, columns]. Audio: [frames, K], each code local to its codebook."""
    uri: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """One document as tokens: a row of the dataset."""

    token_ids: Ids
    """int32 [T], each local to its modality's vocabulary."""
    modality_ids: ModalityIds
    """int8 [T]."""
    spans: list[Span]

    def count(self, modality: Modality) -> int:
        """Tokens of a modality; special tokens are text."""
        if modality is Modality.TEXT:
            return len(self.token_ids) - sum(s.length for s in self.spans if s.modality is not Modality.TEXT)
        return sum(s.length for s in self.spans if s.modality is modality)


def sequence_length(spans: list[EncodedSpan]) -> int:
    """Tokens that `interleave` will make of the spans, the special tokens included."""
    return 2 + sum(s.codes.size + (0 if s.modality is Modality.TEXT else MEDIA_OPENING) for s in spans)


def interleave(vocabulary: Vocabulary, spans: list[EncodedSpan]) -> Sequence:
    """Lay the spans of a document out as one sequence.

    Raises:
        SequenceError: no span, an empty span, two text spans in a row (their border would be lost), wrong shape, or a
            code outside its codebook. The message names the span.
    """
    if not spans:
        raise SequenceError("a document needs at least one span")
    total = sequence_length(spans)
    token_ids = np.empty(total, dtype=np.int32)
    modality_ids = np.zeros(total, dtype=np.int8)
    token_ids[0], token_ids[-1] = vocabulary.document, vocabulary.end
    placed: list[Span] = []
    at = 1
    for index, span in enumerate(spans):
        _check(vocabulary, index, span, after=spans[index - 1] if index else None)
        rows = columns = 0
        ids = span.codes
        if span.modality is not Modality.TEXT:
            rows, columns = span.codes.shape
            if span.modality is Modality.IMAGE:
                opening = vocabulary.image_opening(rows, columns)
            else:
                opening = vocabulary.audio_opening(rows)
                ids = span.codes + np.arange(columns, dtype=np.int32) * vocabulary.audio_codebook_size
            token_ids[at : at + MEDIA_OPENING] = opening
            at += MEDIA_OPENING
        stop = at + span.codes.size
        token_ids[at:stop] = ids.reshape(-1)
        modality_ids[at:stop] = span.modality
        placed.append(
            Span(modality=span.modality, start=at, length=stop - at, rows=rows, columns=columns, uri=span.uri)
        )
        at = stop
    return Sequence(token_ids=token_ids, modality_ids=modality_ids, spans=placed)


def deinterleave(vocabulary: Vocabulary, token_ids: Ids, modality_ids: ModalityIds) -> list[EncodedSpan]:
    """The inverse of `interleave`, from the tokens alone (so without the spans' uris).

    Raises:
        SequenceError: the tokens are not one document.
    """
    return [extract(vocabulary, token_ids, span) for span in parse(vocabulary, token_ids, modality_ids)]


def extract(vocabulary: Vocabulary, token_ids: Ids, span: Span) -> EncodedSpan:
    """The codes of one span of a document."""
    codes = token_ids[span.start : span.start + span.length]
    if span.modality is not Modality.TEXT:
        codes = codes.reshape(span.rows, span.columns)
    if span.modality is Modality.AUDIO:
        codes = codes - np.arange(span.columns, dtype=np.int32) * vocabulary.audio_codebook_size
    return EncodedSpan(modality=span.modality, codes=codes, uri=span.uri)


def _check(vocabulary: Vocabulary, index: int, span: EncodedSpan, *, after: EncodedSpan | None) -> None:
    where = f"span {index} ({span.modality.label})"
    dimensions = 1 if span.modality is Modality.TEXT else 2
    if span.codes.ndim != dimensions or span.codes.size == 0:
        raise SequenceError(f"{where}: codes have shape {span.codes.shape}; expected {dimensions} non-empty dimensions")
    if span.modality is Modality.TEXT and after is not None and after.modality is Modality.TEXT:
        raise SequenceError(f"{where}: follows another text span; join them into one")
    if span.modality is Modality.AUDIO and span.codes.shape[1] != vocabulary.audio_codebooks:
        raise SequenceError(
            f"{where}: {span.codes.shape[1]} codebooks, but the vocabulary has {vocabulary.audio_codebooks}"
        )
    size = (vocabulary.text_pieces, vocabulary.image_codebook_size, vocabulary.audio_codebook_size)[span.modality]
    low, high = int(span.codes.min()), int(span.codes.max())
    if low < 0 or high >= size:
        raise SequenceError(f"{where}: code {low if low < 0 else high} lies outside 0..{size - 1}")
