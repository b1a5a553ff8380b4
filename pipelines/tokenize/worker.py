"""The work of one unit, as one plain callable: it runs inside a Ray actor, and without Ray too.

Enters: a `WorkUnit`. Leaves: its shard in the dataset's folder, not yet committed. Always holds: what a unit gives
depends on the unit and the recipe alone, and memory is bounded by a window of documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.corpus.documents import Document, RawSpan, Reject
from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import fit_picture, load_picture
from pipelines.corpus.sounds import load_sound
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.schema import Row
from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit

WINDOW_DOCUMENTS = 64
WINDOW_BYTES = 64 * 2**20
"""Documents are decoded and encoded in windows of at most so many documents and raw bytes."""


@dataclass(slots=True)
class _Prepared:
    """A document whose media are decoded: for each span text, pixels uint8 [H, W, 3], or float32 [samples]."""

    document: Document
    spans: list[tuple[Modality, str | np.ndarray, str]]


class UnitWorker:
    """Holds the tokenizers of a recipe and turns units into shards."""

    def __init__(self, recipe: TokenizeRecipe, device: str = "cpu") -> None:
        torch.set_num_threads(recipe.threads)
        self.recipe = recipe
        self.tokenizers = Tokenizers.load(recipe, device)
        self.vocabulary: Vocabulary = self.tokenizers.vocabulary(recipe)
        self._sources = {source.name: source for source in recipe.sources}
        self._storage = Storage.of(recipe.dataset)

    def run(self, unit: WorkUnit) -> WrittenShard:
        """Read, decode, tokenize, interleave and write one unit."""
        writer = ShardWriter(self._storage, self.vocabulary, unit.id, unit.record())
        for result in self.rows(unit):
            if isinstance(result, Reject):
                writer.reject(result)
            else:
                writer.add(result)
        return writer.finish()

    def rows(self, unit: WorkUnit) -> Iterator[Row | Reject]:
        """The rows of a unit and what had to be rejected, in the order of the corpus."""
        seen: set[str] = set()
        for window in _windows(self._sources[unit.source].read(unit.slices)):
            for result in self._tokenize(window):
                if isinstance(result, Row):
                    if result.row_id in seen:
                        yield _twice(result)
                        continue
                    seen.add(result.row_id)
                yield result

    def _tokenize(self, window: list[Document | Reject]) -> Iterator[Row | Reject]:
        prepared = [self._prepare(item) if isinstance(item, Document) else item for item in window]
        rows = self._encode([item for item in prepared if isinstance(item, _Prepared)])
        for item in prepared:
            yield item if isinstance(item, Reject) else next(rows)

    def _prepare(self, document: Document) -> _Prepared | Reject:
        spans: list[tuple[Modality, str | np.ndarray, str]] = []
        for span in document.spans:
            try:
                spans += self._decoded(span)
            except MediaError as error:
                return Reject(
                    source=document.source,
                    position=document.position,
                    reason=f"{span.modality.label}: cannot be decoded",
                    error=str(error),
                )
        return _Prepared(document, spans)

    def _decoded(self, span: RawSpan) -> Iterator[tuple[Modality, str | np.ndarray, str]]:
        settings = self.recipe.tokenizers
        if span.modality is Modality.TEXT:
            yield span.modality, span.text, span.uri
        elif span.modality is Modality.IMAGE:
            image, tokenizer = settings.image, self.tokenizers.image
            if image is None or tokenizer is None:
                raise MediaError(f"{span.uri}: a picture, but the recipe names no image tokenizer (tokenizers.image)")
            f = tokenizer.downsampling
            pixels = load_picture(span.data, span.uri)
            yield (
                span.modality,
                fit_picture(pixels, (image.rows * f, image.columns * f), multiple=f, mode=image.fit),
                span.uri,
            )
        else:
            audio, codec = settings.audio, self.tokenizers.audio
            if audio is None or codec is None:
                raise MediaError(f"{span.uri}: a sound, but the recipe names no audio tokenizer (tokenizers.audio)")
            waveform = load_sound(
                span.data,
                span.uri,
                codec.sample_rate_hz,
                max_seconds=audio.max_seconds,
                loudness_db=audio.loudness_db,
            )
            # Parts of equal length: a tail of some frames would be a span that says nothing.
            frames = codec.frames(len(waveform))
            parts = -(-frames // audio.max_frames)
            size = -(-frames // parts) * codec.hop
            for start in range(0, len(waveform), size):
                yield span.modality, waveform[start : start + size], span.uri

    def _encode(self, documents: list[_Prepared]) -> Iterator[Row | Reject]:
        """Encode a window, each modality in one call, and lay each document out."""
        codes: dict[Modality, Iterator[np.ndarray]] = {
            Modality.TEXT: iter(self.tokenizers.text.encode(_payloads(documents, Modality.TEXT)))
        }
        if self.tokenizers.image and (pictures := _payloads(documents, Modality.IMAGE)):
            codes[Modality.IMAGE] = iter(self.tokenizers.image.encode(np.stack(pictures)))
        if self.tokenizers.audio and (sounds := _payloads(documents, Modality.AUDIO)):
            codes[Modality.AUDIO] = iter(self.tokenizers.audio.encode(sounds))
        for item in documents:
            spans = [
                EncodedSpan(modality=modality, codes=next(codes[modality]), uri=uri) for modality, _, uri in item.spans
            ]
            # A normalizer may leave nothing of a text, such as one of zero-width spaces.
            spans = [span for span in spans if span.codes.size]
            document = item.document
            if not spans:
                yield Reject(
                    source=document.source,
                    position=document.position,
                    reason="text: empty",
                    error=f"{document.source}: the text tokenizer makes no piece of this text; remove the document",
                )
                continue
            yield Row(
                row_id=document.row_id,
                content_hash=document.content_hash,
                source=document.source,
                sequence=interleave(self.vocabulary, spans),
            )


def _twice(row: Row) -> Reject:
    return Reject(
        source=row.source,
        position=0,
        reason="row id: twice",
        error=f"{row.source}: a document with this identity came before it; give each record an id of its own",
    )


def _payloads(documents: Iterable[_Prepared], modality: Modality) -> list:  # type: ignore[type-arg]
    return [payload for item in documents for m, payload, _ in item.spans if m is modality]


def _size(document: Document) -> int:
    return sum(len(span.data) + len(span.text.encode()) for span in document.spans)


def _windows(items: Iterable[Document | Reject]) -> Iterator[list[Document | Reject]]:
    window: list[Document | Reject] = []
    size = 0
    for item in items:
        window.append(item)
        if isinstance(item, Document):
            size += _size(item)
        if len(window) >= WINDOW_DOCUMENTS or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window
