"""The work of one unit, as one plain callable: it runs inside a Ray actor, and without Ray too.

Enters: a `WorkUnit`. Leaves: its shard in the dataset's folder, not yet committed. Always holds: what a unit gives
depends on the unit and the recipe alone, and memory is bounded by a window of decoded documents.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from pipelines.corpus.documents import Document, Dropped, Reject
from pipelines.corpus.errors import StoreError
from pipelines.corpus.filters import draw
from pipelines.corpus.reader import Reader
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Modality, SequenceError, Vocabulary
from pipelines.shards.schema import Row
from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.prepare import Prepared, prepare
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenizers.vqgan import ImageTokenizer

WINDOW_DOCUMENTS = 64
WINDOW_BYTES = 64 * 2**20
"""Documents are encoded in windows of at most so many documents; a window ends with the document that fills so many bytes
of decoded media and text. So it never holds more than these bytes and one document more, itself at most `MOST_BYTES`."""


class UnitWorker:
    """Holds the tokenizers of a recipe and turns units into shards."""

    def __init__(self, recipe: TokenizeRecipe, device: str = "cpu") -> None:
        torch.set_num_threads(recipe.threads)
        self.recipe = recipe
        self.tokenizers = Tokenizers.load(recipe, device)
        self.vocabulary: Vocabulary = self.tokenizers.vocabulary(recipe)
        bound = (source.bound(self.vocabulary, recipe.sequence_length) for source in recipe.sources)
        self._sources = {source.name: source for source in bound}
        self._storage = Storage.of(recipe.dataset)

    def ready(self, witness: str) -> None:
        """Answer once the tokenizers are loaded.

        Args:
            witness: name of a file that the driver wrote into the dataset.

        Raises:
            StoreError: this machine does not see it.
        """
        if not self._storage.exists(witness):
            raise StoreError(
                f"dataset = {self.recipe.dataset}: worker node {platform.node()} does not see the file {witness} that the "
                "driver wrote there; name a folder on a file system that all nodes share, or an object store"
            )

    def run(self, unit: WorkUnit) -> WrittenShard:
        """Read, decode, tokenize, interleave and write one unit."""
        with ShardWriter(self._storage, self.vocabulary, unit.id, unit.record()) as writer:
            for result in self.rows(unit):
                if isinstance(result, Reject):
                    writer.reject(result)
                elif isinstance(result, Dropped):
                    writer.drop(result)
                else:
                    writer.add(result)
            return writer.finish()

    def rows(self, unit: WorkUnit) -> Iterator[Row | Reject | Dropped]:
        """The rows of a unit, what had to be rejected and what a filter took out, in the order of the corpus."""
        seen: set[str] = set()
        source = self._sources[unit.source]
        prepared = (self._prepare(source, item) for item in source.read(unit.slices))
        for window in _windows(prepared):
            rows = self._encode([item for item in window if isinstance(item, Prepared)])
            for item in window:
                result = next(rows) if isinstance(item, Prepared) else item
                if isinstance(result, Row):
                    if result.row_id in seen:
                        yield _twice(result)
                        continue
                    seen.add(result.row_id)
                yield result

    def _prepare(self, source: Reader, item: Document | Reject | Dropped) -> Prepared | Reject | Dropped:
        if isinstance(item, Reject | Dropped):
            return item
        if source.weight < 1 and draw("weight", source.seed, item.row_id) >= source.weight:
            return Dropped(source=item.source, position=item.position, reason="weight")
        return prepare(item, source.filters, self.recipe, self.tokenizers)

    def _encode(self, documents: list[Prepared]) -> Iterator[Row | Reject]:
        """Encode a window, each modality in one call, and lay each document out."""
        codes: dict[Modality, Iterator[np.ndarray]] = {
            Modality.TEXT: iter(self.tokenizers.text.encode(_payloads(documents, Modality.TEXT)))
        }
        if self.tokenizers.image and (pictures := _payloads(documents, Modality.IMAGE)):
            codes[Modality.IMAGE] = _by_shape(self.tokenizers.image, pictures)
        if self.tokenizers.audio and (sounds := _payloads(documents, Modality.AUDIO)):
            codes[Modality.AUDIO] = iter(self.tokenizers.audio.encode(sounds))
        for item in documents:
            spans = [
                EncodedSpan(
                    modality=part.modality,
                    codes=np.asarray(part.payload) if part.encoded else next(codes[part.modality]),
                    uri=part.uri,
                )
                for part in item.parts
            ]
            # A normalizer may leave nothing of a text, such as one of zero-width spaces.
            yield self._row(item, [span for span in spans if span.codes.size])

    def _row(self, document: Prepared, spans: list[EncodedSpan]) -> Row | Reject:
        if not spans:
            return Reject(
                source=document.source,
                position=document.position,
                reason="text: empty",
                error=f"{document.source}: the text tokenizer makes no piece of this text; remove the document",
            )
        try:
            sequence = interleave(self.vocabulary, spans)
        except SequenceError as error:
            # Only codes that came as such can break the contract.
            return Reject(
                source=document.source,
                position=document.position,
                reason="tokens: not a document",
                error=f"{document.source}: {error}",
            )
        return Row(
            row_id=document.row_id,
            content_hash=document.content_hash,
            source=document.source,
            sequence=sequence,
            raw_bytes=document.raw_bytes,
        )


def _by_shape(tokenizer: ImageTokenizer, pictures: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The codes of each picture, in order; pictures of one shape are encoded in one call."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        alike.setdefault(picture.shape, []).append(index)
    codes: dict[int, np.ndarray] = {}
    for indices in alike.values():
        codes.update(zip(indices, tokenizer.encode(np.stack([pictures[i] for i in indices])), strict=True))
    return (codes[index] for index in range(len(pictures)))


def _twice(row: Row) -> Reject:
    return Reject(
        source=row.source,
        position=0,
        reason="row id: twice",
        error=f"{row.source}: a document with this identity came before it; give each record an id of its own",
    )


def _payloads(documents: Iterable[Prepared], modality: Modality) -> list:  # type: ignore[type-arg]
    return [part.payload for item in documents for part in item.parts if part.modality is modality and not part.encoded]


def _windows(items: Iterable[Prepared | Reject | Dropped]) -> Iterator[list[Prepared | Reject | Dropped]]:
    window: list[Prepared | Reject | Dropped] = []
    size = 0
    for item in items:
        window.append(item)
        if isinstance(item, Prepared):
            size += item.size
        if len(window) >= WINDOW_DOCUMENTS or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window
