"""A document's raw spans to what the tokenizers take: text, pixels of one size, waveforms at one rate.

Enters: a `Document`. Leaves: a `Prepared`, or the `Reject` or `Dropped` that stands for it. Always holds: each media
file is decoded once, and what comes out depends on the document and the recipe alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.documents import Document, Dropped, RawSpan, Reject
from pipelines.corpus.errors import MediaError
from pipelines.corpus.filters import Filters
from pipelines.corpus.pictures import fit_picture, load_picture
from pipelines.corpus.sounds import load_sound
from pipelines.sequence import Modality
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes one span: text, pixels uint8 [H, W, 3], a waveform float32 [samples], or codes that came as such."""

    modality: Modality
    payload: str | NDArray[Any]
    uri: str
    encoded: bool = False
    """Whether the payload is codes already."""

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.payload) if isinstance(self.payload, str) else self.payload.nbytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document whose media are decoded."""

    document: Document
    parts: list[Part]

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(part.size for part in self.parts) + sum(len(span.data) for span in self.document.spans)


class _DroppedError(Exception):
    """A decoded picture or sound fails a filter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def prepare(
    document: Document, filters: Filters, recipe: TokenizeRecipe, tokenizers: Tokenizers
) -> Prepared | Reject | Dropped:
    """Decode the media of a document, unless a filter drops it."""
    reason = filters.drops(document)
    parts: list[Part] = []
    span = None
    try:
        if reason is None:
            for span in document.spans:
                parts += _parts(span, filters, recipe, tokenizers)
            return Prepared(document, parts)
    except _DroppedError as dropped:
        reason = dropped.reason
    except MediaError as error:
        assert span is not None
        return Reject(
            source=document.source,
            position=document.position,
            reason=f"{span.modality.label}: cannot be decoded",
            error=str(error),
        )
    return Dropped(source=document.source, position=document.position, reason=reason)


def _parts(span: RawSpan, filters: Filters, recipe: TokenizeRecipe, tokenizers: Tokenizers) -> Iterator[Part]:
    if span.codes is not None:
        yield Part(span.modality, span.codes, span.uri, encoded=True)
    elif span.modality is Modality.TEXT:
        yield Part(span.modality, span.text, span.uri)
    elif span.modality is Modality.IMAGE:
        yield Part(span.modality, _pixels(span, filters, recipe, tokenizers), span.uri)
    else:
        for waveform in _waveforms(span, filters, recipe, tokenizers):
            yield Part(span.modality, waveform, span.uri)


def _pixels(span: RawSpan, filters: Filters, recipe: TokenizeRecipe, tokenizers: Tokenizers) -> NDArray[np.uint8]:
    settings, tokenizer = recipe.tokenizers.image, tokenizers.image
    if settings is None or tokenizer is None:
        raise MediaError(f"{span.uri}: a picture, but the recipe names no image tokenizer (tokenizers.image)")
    pixels = load_picture(span.data, span.uri)
    if reason := filters.drops_picture(*pixels.shape[:2]):
        raise _DroppedError(reason)
    f = tokenizer.downsampling
    return fit_picture(pixels, (settings.rows * f, settings.columns * f), multiple=f, mode=settings.fit)


def _waveforms(
    span: RawSpan, filters: Filters, recipe: TokenizeRecipe, tokenizers: Tokenizers
) -> Iterator[NDArray[np.float32]]:
    settings, codec = recipe.tokenizers.audio, tokenizers.audio
    if settings is None or codec is None:
        raise MediaError(f"{span.uri}: a sound, but the recipe names no audio tokenizer (tokenizers.audio)")
    waveform = load_sound(
        span.data,
        span.uri,
        codec.sample_rate_hz,
        max_seconds=settings.max_seconds,
        loudness_db=settings.loudness_db,
    )
    if reason := filters.drops_sound(len(waveform) / codec.sample_rate_hz):
        raise _DroppedError(reason)
    # Parts of equal length: a tail of some frames would be a span that says nothing.
    frames = codec.frames(len(waveform))
    count = -(-frames // settings.max_frames)
    size = -(-frames // count) * codec.hop
    for start in range(0, len(waveform), size):
        yield waveform[start : start + size]
