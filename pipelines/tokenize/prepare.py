"""A document's raw spans to what the tokenizers take: text, pixels of one size, waveforms at one rate.

Enters: a `Document`. Leaves: a `Prepared`, or the `Reject` or `Dropped` that stands for it. Always holds: each media
file is decoded once, what comes out depends on the document and the recipe alone, and no document takes more than
`MOST_BYTES` once it is decoded. Nothing of a network is needed here, so decoders start without PyTorch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.documents import Document, Dropped, RawSpan, Reject
from pipelines.corpus.errors import MediaError
from pipelines.corpus.filters import Filters, draw
from pipelines.corpus.pictures import fit_to_codes, load_picture
from pipelines.corpus.sounds import equal_parts, load_sound
from pipelines.sequence import Modality
from pipelines.tokenize.recipe import AudioTokenizerSettings, ImageTokenizerSettings, TokenizerSettings

MOST_BYTES = 2**30
"""Memory of one document's texts, fitted pictures and waveforms together; what would take more is quarantined."""


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
        return sys.getsizeof(self.payload) if isinstance(self.payload, str) else self.payload.nbytes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document whose media are decoded; their files' bytes are let go."""

    row_id: str
    source: str
    position: int
    content_hash: str
    parts: list[Part]
    raw_bytes: tuple[int, int, int] | None
    """Bytes of its texts, pictures and sounds as they lie in the corpus; None where some came as codes."""

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(part.size for part in self.parts)

    def emptied(self) -> Prepared:
        """The document without what has gone to the tokenizers, so that its memory is free while codes are on their way."""
        parts = [part if part.encoded else Part(part.modality, "", part.uri) for part in self.parts]
        return replace(self, parts=parts)


Item = Prepared | Reject | Dropped
"""A document on its way to the tokenizers, or what stands for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What the tokenizers take; None where there is no tokenizer."""

    downsampling: int | None
    """Pixels of one code in each direction."""
    sample_rate_hz: int | None
    hop: int | None
    """Samples of one frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a source's documents must be to be wanted."""

    filters: Filters
    weight: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """All that a decoder needs to know of a recipe and its tokenizers."""

    settings: TokenizerSettings
    shapes: Shapes
    choices: dict[str, Choice]
    """By source."""

    def prepare(self, source: str, document: Document | Reject | Dropped) -> Item:
        """Decode the media of a source's document, unless it is not wanted; what stands for one stays as it is."""
        if not isinstance(document, Document):
            return document
        choice = self.choices[source]
        if choice.weight < 1 and draw("weight", choice.seed, document.row_id) >= choice.weight:
            return Dropped(source=document.source, position=document.position, reason="weight")
        return prepare(document, choice.filters, self.settings, self.shapes)


class _DroppedError(Exception):
    """A decoded picture or sound fails a filter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def prepare(
    document: Document, filters: Filters, settings: TokenizerSettings, shapes: Shapes
) -> Prepared | Reject | Dropped:
    """Decode the media of a document, unless a filter drops it."""
    source, position = document.source, document.position
    if reason := filters.drops(document):
        return Dropped(source=source, position=position, reason=reason)
    try:
        document = document.loaded()
    except OSError as error:
        message = f"{source}: cannot be read: {error.strerror or error}; restore or remove it"
        return Reject(source=source, position=position, reason="file: unreadable", error=message)
    parts: list[Part] = []
    size = 0
    for span in document.spans:
        try:
            made = list(_parts(span, filters, settings, shapes))
        except _DroppedError as dropped:
            return Dropped(source=source, position=position, reason=dropped.reason)
        except MediaError as error:
            reason = f"{span.modality.label}: {error.fault}"
            return Reject(source=source, position=position, reason=reason, error=str(error))
        parts += made
        size += sum(part.size for part in made)
        if size > MOST_BYTES:
            message = f"{source}: over {MOST_BYTES:,} bytes once it is decoded, at {span.uri}; split it into several"
            return Reject(source=source, position=position, reason="document: too large", error=message)
    return Prepared(document.row_id, source, position, document.content_hash, parts, _raw_bytes(document))


def _raw_bytes(document: Document) -> tuple[int, int, int] | None:
    if any(span.codes is not None for span in document.spans):
        return None
    counts = [0, 0, 0]
    for span in document.spans:
        # A text may hold a lone surrogate, which UTF-8 cannot.
        counts[span.modality] += len(span.text.encode("utf-8", "replace")) + len(span.data)
    return counts[0], counts[1], counts[2]


def _parts(span: RawSpan, filters: Filters, settings: TokenizerSettings, shapes: Shapes) -> Iterator[Part]:
    if span.codes is not None:
        yield Part(span.modality, span.codes, span.uri, encoded=True)
    elif span.modality is Modality.TEXT:
        most = settings.text.max_characters
        if len(span.text) > most:
            message = (
                f"{span.uri}: {len(span.text):,} characters, over tokenizers.text.max_characters = {most:,}; split it"
            )
            raise MediaError(message, "too long")
        yield Part(span.modality, span.text, span.uri)
    elif span.modality is Modality.IMAGE:
        yield Part(span.modality, _pixels(span, filters, settings.image, shapes.downsampling), span.uri)
    else:
        for waveform in _waveforms(span, filters, settings.audio, shapes.sample_rate_hz, shapes.hop):
            yield Part(span.modality, waveform, span.uri)


def _pixels(
    span: RawSpan, filters: Filters, settings: ImageTokenizerSettings | None, downsampling: int | None
) -> NDArray[np.uint8]:
    if settings is None or downsampling is None:
        message = f"{span.uri}: a picture, but the recipe names no image tokenizer (tokenizers.image)"
        raise MediaError(message, "no tokenizer")
    pixels = load_picture(span.content, span.uri, settings.background, settings.max_pixels)
    if reason := filters.drops_picture(*pixels.shape[:2]):
        raise _DroppedError(reason)
    return fit_to_codes(
        pixels,
        rows=settings.rows,
        columns=settings.columns,
        downsampling=downsampling,
        fit=settings.fit,
        background=settings.background,
    )


def _waveforms(
    span: RawSpan,
    filters: Filters,
    settings: AudioTokenizerSettings | None,
    sample_rate_hz: int | None,
    hop: int | None,
) -> list[NDArray[np.float32]]:
    if settings is None or sample_rate_hz is None or hop is None:
        message = f"{span.uri}: a sound, but the recipe names no audio tokenizer (tokenizers.audio)"
        raise MediaError(message, "no tokenizer")
    waveform = load_sound(
        span.content,
        span.uri,
        sample_rate_hz,
        max_seconds=settings.max_seconds,
        loudness_db=settings.loudness_db,
    )
    if reason := filters.drops_sound(len(waveform) / sample_rate_hz):
        raise _DroppedError(reason)
    return equal_parts(waveform, hop, settings.max_frames)
