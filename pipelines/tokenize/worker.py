"""The work of one unit, as one plain callable: it runs inside a Ray actor, and without Ray too.

Enters: a `WorkUnit`. Leaves: its shard in the dataset's folder, not yet committed. Always holds: what a unit gives
depends on the unit and the recipe alone, and memory is bounded by a few windows of decoded documents. On a CPU reading,
decoding, encoding and writing take turns; on a GPU each runs ahead of the next, and what reads, decodes and writes are
processes of their own.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import torch

from pipelines.corpus.errors import StoreError
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.ahead import ahead, in_turn
from pipelines.tokenize.layout import Codes, Encoded, Result, rows_of
from pipelines.tokenize.prepare import Choice, Preparation
from pipelines.tokenize.reading import ReadingProcess
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.windows import Chunk, Items, WindowSize, windows_of
from pipelines.tokenize.writing import WritingProcess
from pipelines.tokenizers.vqgan import ImageTokenizer

ON_CPU = WindowSize(documents=64, size=64 * 2**20)
ON_GPU = WindowSize(documents=256, size=256 * 2**20, first=64)
"""Several batches, so that the GPU need not wait for what comes between two windows, but few at first, so that it soon has
something to do, and goes on with it while the next ones are decoded. Up to five windows are in memory: one being decoded,
one being copied to where the GPU fetches it, one that waits before each of the two, and one on its way to the GPU; where a
unit ends and the next one begins a few more."""

_ENCODED = 8
"""Windows of codes, which are small, that may wait until the unit before has been laid out."""

UNITS_AT_ONCE = 3
"""Units that a worker with a GPU is to have: while one is written another one is encoded and the next one is read."""

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
        self._storage = Storage.of(recipe.dataset)
        self.window = ON_CPU if device == "cpu" else ON_GPU
        self.decoders = 0 if device == "cpu" else max(1, int(recipe.cluster.cpus_per_worker or 1))
        """Processes that decode while the tokenizers encode; without any, all stages take turns."""
        self._writing = WritingProcess(recipe.dataset, self.vocabulary)
        self._staging, self._encoding = threading.Lock(), threading.Lock()
        """The turns of units, if several are done at once."""
        choices = {s.name: Choice(filters=s.filters, weight=s.weight, seed=s.seed) for s in recipe.sources}
        shapes = self.tokenizers.shapes
        preparation = Preparation(settings=recipe.tokenizers, shapes=shapes, choices=choices)
        self._reading = ReadingProcess({source.name: source for source in bound}, preparation)

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
        """End the processes that read, decode and write, if there are any."""
        self._reading.close()
        self._writing.close()

    def run(self, unit: WorkUnit) -> WrittenShard:
        """Read, decode, tokenize, interleave and write one unit.

        Beside a GPU another thread may give the next unit meanwhile: each stage takes it up when it is done with this one.
        """
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

    def _windows(self, unit: WorkUnit) -> Generator[Encoded, None, None]:
        """The windows of a unit with their codes."""
        # While another unit is encoded, the GPU does not wait for this one, and large batches take less time.
        windows = windows_of(self._chunks(unit), self.window, in_a_hurry=lambda: not self._encoding.locked())
        if self.decoders:
            staged = ahead(self._staged(ahead(windows, "read")), "stage")
            return ahead(self._encoded(staged), "encode", depth=_ENCODED)
        return self._encoded(self._staged(windows))

    def _chunks(self, unit: WorkUnit) -> Iterator[Chunk]:
        if self.decoders:
            yield from self._reading.chunks(unit, self.decoders, self.window.documents)
            return
        prepare = self._reading.preparation.prepare
        for item in self._reading.sources[unit.source].read(unit.slices):
            yield Chunk.of([prepare(unit.source, item)])

    def _staged(self, windows: Generator[list[Chunk], None, None]) -> Generator[tuple[list[Items], Start], None, None]:
        """The items of each window, without its media, and what begins to encode them."""
        with closing(in_turn(windows, self._staging)) as mine:
            for window in mine:
                start, items = self._stage(window), [chunk.items for chunk in window]
                # While it waits for whoever takes the window, this must not hold its media.
                del window
                yield items, start

    def _encoded(self, windows: Generator[tuple[list[Items], Start], None, None]) -> Generator[Encoded, None, None]:
        """Each window with its codes. Beside decoders the next window is begun before the codes of one are waited for."""
        begun: list[tuple[list[Items], Callable[[], Codes]]] = []
        with closing(in_turn(windows, self._encoding)) as mine:
            for items, start in mine:
                begun.append((items, start()))
                if len(begun) > bool(self.decoders):
                    done, codes = begun.pop(0)
                    yield done, codes()
        for done, codes in begun:
            yield done, codes()

    def _stage(self, window: list[Chunk]) -> Start:
        """Encode the texts of a window and make its media ready, sounds in one call, pictures in one for each shape."""
        codes: Codes = {Modality.TEXT: self.tokenizers.text.encode([text for chunk in window for text in chunk.texts])}
        staged: dict[Modality, Callable[[], Callable[[], list[np.ndarray]]]] = {}
        if self.tokenizers.image and (pictures := [picture for chunk in window for picture in chunk.pictures]):
            staged[Modality.IMAGE] = partial(_start_by_shape, self.tokenizers.image, pictures)
        if self.tokenizers.audio and (sounds := [sound for chunk in window for sound in chunk.sounds]):
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
        return [codes[index] for index in range(len(codes))]

    return result
