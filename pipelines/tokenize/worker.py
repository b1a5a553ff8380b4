"""The work of one unit, as one plain callable: it runs inside a Ray actor, and without Ray too.

Enters: a `WorkUnit`. Leaves: its shard in the dataset's folder, not yet committed. Always holds: what a unit gives
depends on the unit and the recipe alone, and memory is bounded by a few windows of decoded documents. On a CPU reading,
decoding, encoding and writing take turns; on a GPU each runs ahead of the next, and what decodes and what writes are
processes of their own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pipelines.corpus.documents import Document, Dropped, Reject
from pipelines.corpus.errors import StoreError
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.ahead import ahead
from pipelines.tokenize.decoders import Decoders
from pipelines.tokenize.layout import Codes, Result, rows_of
from pipelines.tokenize.prepare import Choice, Item, Preparation, Prepared
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.writing import WritingProcess
from pipelines.tokenizers.vqgan import ImageTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Documents are encoded in windows of at most so many; a window ends with the document that fills so many bytes of
    decoded media and text. So it never holds more than these bytes and one document more, itself at most `MOST_BYTES`."""

    documents: int
    size: int
    first: int | None = None
    """Documents of a unit's first window, where that is smaller; from there each has twice as many as the one before."""


ON_CPU = Window(documents=64, size=64 * 2**20)
ON_GPU = Window(documents=256, size=256 * 2**20, first=64)
"""Several batches, so that the GPU need not wait for what comes between two windows, but few at first, so that it soon has
something to do, and goes on with it while the next ones are decoded. Up to five windows are in memory: one being decoded,
one being copied to where the GPU fetches it, one that waits before each of the two, and one on its way to the GPU."""

Start = Callable[[], Callable[[], Codes]]
"""Begins to encode a window, and gives what waits for its codes. To be called once."""


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
        self.window = ON_CPU if device == "cpu" else ON_GPU
        self.decoders = 0 if device == "cpu" else max(1, int(recipe.cluster.cpus_per_worker))
        """Processes that decode while the tokenizers encode; without any, all stages take turns."""
        self._decoders: Decoders | None = None
        self._writing = WritingProcess(recipe.dataset, self.vocabulary)
        choices = {s.name: Choice(filters=s.filters, weight=s.weight, seed=s.seed) for s in recipe.sources}
        shapes = self.tokenizers.shapes
        self._preparation = Preparation(settings=recipe.tokenizers, shapes=shapes, choices=choices)

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

    def close(self) -> None:
        """End decoders and writer, if there are any."""
        self._writing.close()
        if self._decoders:
            self._decoders.close()
            self._decoders = None

    def run(self, unit: WorkUnit) -> WrittenShard:
        """Read, decode, tokenize, interleave and write one unit."""
        if self.decoders:
            with closing(self._windows(unit)) as windows:
                return self._writing.write(unit, windows)
        with ShardWriter(self._storage, self.vocabulary, unit.id, unit.record()) as writer:
            writer.take(self.rows(unit))
            return writer.finish()

    def rows(self, unit: WorkUnit) -> Iterator[Result]:
        """The rows of a unit, what had to be rejected and what a filter took out, in the order of the corpus."""
        with closing(self._windows(unit)) as windows:
            yield from rows_of(windows, self.vocabulary)

    def _windows(self, unit: WorkUnit) -> Generator[tuple[list[Item], Codes], None, None]:
        """The windows of a unit with their codes."""
        source = self._sources[unit.source]
        windows = _windows(self._prepared(unit.source, source.read(unit.slices)), self.window)
        if self.decoders:
            return ahead(self._encoded(ahead(self._staged(ahead(windows, "read")), "stage")), "encode")
        return self._encoded(self._staged(windows))

    def _prepared(self, source: str, items: Iterable[Document | Reject | Dropped]) -> Iterator[Item]:
        if not self.decoders:
            for item in items:
                yield self._preparation.prepare(source, item) if isinstance(item, Document) else item
            return
        if self._decoders is None:
            self._decoders = Decoders(self._preparation, self.decoders)
        yield from self._decoders.prepared(source, items)

    def _staged(self, windows: Iterable[list[Item]]) -> Generator[tuple[list[Item], Start], None, None]:
        """Each window without its media, and what begins to encode them."""
        for window in windows:
            start = self._stage(window)
            # While it waits for whoever takes the window, this must not hold its media.
            window = [item.emptied() if isinstance(item, Prepared) else item for item in window]
            yield window, start

    def _encoded(self, windows: Iterable[tuple[list[Item], Start]]) -> Generator[tuple[list[Item], Codes], None, None]:
        """Each window with its codes. Beside decoders the next window is begun before the codes of one are waited for."""
        begun: list[tuple[list[Item], Callable[[], Codes]]] = []
        for window, start in windows:
            begun.append((window, start()))
            if len(begun) > bool(self.decoders):
                done, codes = begun.pop(0)
                yield done, codes()
        for done, codes in begun:
            yield done, codes()

    def _stage(self, window: list[Item]) -> Start:
        """Encode the texts of a window and make its media ready, sounds in one call, pictures in one for each shape."""
        documents = [item for item in window if isinstance(item, Prepared)]
        codes: Codes = {Modality.TEXT: self.tokenizers.text.encode(_payloads(documents, Modality.TEXT))}
        staged: dict[Modality, Callable[[], Callable[[], list[np.ndarray]]]] = {}
        if self.tokenizers.image and (pictures := _payloads(documents, Modality.IMAGE)):
            staged[Modality.IMAGE] = partial(_start_by_shape, self.tokenizers.image, pictures)
        if self.tokenizers.audio and (sounds := _payloads(documents, Modality.AUDIO)):
            staged[Modality.AUDIO] = self.tokenizers.audio.stage(sounds)

        def start() -> Callable[[], Codes]:
            # Each is let go of once it has begun, and with it what it would encode.
            begun = {modality: staged.pop(modality)() for modality in list(staged)}
            return lambda: codes | {modality: result() for modality, result in begun.items()}

        return start


def _start_by_shape(tokenizer: ImageTokenizer, pictures: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """Begin to encode pictures, those of one shape in one call; what is returned gives the codes of each, in order."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        alike.setdefault(picture.shape, []).append(index)
    begun = [(indices, tokenizer.start([pictures[i] for i in indices])) for indices in alike.values()]

    def result() -> list[np.ndarray]:
        codes = {index: found for indices, wait in begun for index, found in zip(indices, wait(), strict=True)}
        return [codes[index] for index in range(len(pictures))]

    return result


def _payloads(documents: Iterable[Prepared], modality: Modality) -> list:  # type: ignore[type-arg]
    return [part.payload for item in documents for part in item.parts if part.modality is modality and not part.encoded]


def _windows(items: Iterable[Item], most: Window) -> Generator[list[Item], None, None]:
    window: list[Item] = []
    size = 0
    documents = most.first or most.documents
    for item in items:
        window.append(item)
        if isinstance(item, Prepared):
            size += item.size
        if len(window) >= documents or size >= most.size:
            yield window
            window, size, documents = [], 0, min(2 * documents, most.documents)
    if window:
        yield window
