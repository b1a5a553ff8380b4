"""The decoders of a reading process: who decodes which documents, and in which order they come back.

Enters: documents. Leaves: the decoders' answers, as they are, in the documents' order. Always holds: a bounded number of
chunks is under way, and decoders end with the process. All on one thread, which waits for decoders and worker at once.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import subprocess
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from pipelines.corpus.documents import Document, Dropped, Reject
from pipelines.corpus.errors import TransientError
from pipelines.tokenize.decoder import Place
from pipelines.tokenize.pipes import WorkerGoneError, answer_of, send, started
from pipelines.tokenize.prepare import Preparation

CHUNK_DOCUMENTS = 16
CHUNK_BYTES = 8 * 2**20
"""Documents that go to a decoder at once: a message costs as much as decoding a small picture. A chunk ends with the document
that fills so many bytes of its files."""

TOLD = struct.Struct("<i")
"""What a worker tells: the number of a place that is free again, or `TAKEN`."""
TAKEN = -1
"""It has taken another chunk."""

_UNDER_WAY = 3
"""Chunks for each decoder, those that wait for the worker included: a slow one holds the others up but little."""


@dataclass(slots=True)
class _Asked:
    """A chunk that is with a decoder, or back."""

    process: subprocess.Popen[bytes]
    where: str
    """Its documents, in words."""
    answer: bytes | None = None


class Decoders:
    """A number of decoding processes, kept from unit to unit.

    Args:
        memory: descriptor of the memory that they share with the worker.
        places: of that memory, for a chunk each.
        told: descriptor of the pipe through which the worker tells what it has taken and let go of.
    """

    def __init__(self, preparation: Preparation, count: int, *, memory: int, places: list[Place], told: int) -> None:
        self._told = told
        self._places, self._free = places, [place.number for place in reversed(places)]
        """The last one that became free is taken first: its pages are there, and in the caches."""
        self._on_the_way = 0
        """Chunks that the worker has not taken."""
        self._processes = [started("pipelines.tokenize.decoder", memory) for _ in range(count)]
        for process in self._processes:
            send(process, preparation)
        self._idle = list(self._processes)
        self._asked: dict[int, _Asked] = {}
        """By the descriptor that answers."""
        self._poll = select.poll()
        self._poll.register(told, select.POLLIN)

    def close(self) -> None:
        """End the processes and wait for them."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def answers(self, source: str, items: Iterable[Document | Reject | Dropped], most: int) -> Iterator[bytes]:
        """What decoders make of the items of a source, at most so many at once; after a decoder that ended, an error is the
        last one.

        Raises:
            WorkerGoneError: the worker has ended, or needs nothing any more.
        """
        waiting: deque[_Asked] = deque()
        for chunk in _chunks(items, min(most, CHUNK_DOCUMENTS)):
            self._look(wait=False)
            yield from _ready(waiting)
            while not self._idle or self._on_the_way >= _UNDER_WAY * len(self._processes):
                self._look(wait=True)
                yield from _ready(waiting)
            waiting.append(self._ask(source, chunk))
        while waiting:
            self._look(wait=True)
            yield from _ready(waiting)

    def _ask(self, source: str, items: list[Document | Reject | Dropped]) -> _Asked:
        process = self._idle.pop()
        assert process.stdout
        asked = _Asked(process, f"one of the {len(items)} documents from {items[0].source} on")
        self._on_the_way += 1
        self._asked[process.stdout.fileno()] = asked
        self._poll.register(process.stdout, select.POLLIN)
        # Where none is free, arrays come through pipes.
        place = self._places[self._free.pop()] if self._free else None
        # One that has ended is seen as soon as its answer is waited for.
        with suppress(BrokenPipeError):
            send(process, (source, place, items))
        return asked

    def _look(self, *, wait: bool) -> None:
        """Take what decoders have answered and the worker has told, and if there is none perhaps wait for some."""
        for descriptor, _ in self._poll.poll(None if wait else 0):
            if descriptor == self._told:
                self._hear()
                continue
            self._poll.unregister(descriptor)
            asked = self._asked.pop(descriptor)
            try:
                asked.answer = answer_of(asked.process, "a decoder", asked.where)
            except TransientError as error:
                asked.answer = pickle.dumps(error, 5)
                continue
            self._idle.append(asked.process)

    def _hear(self) -> None:
        # The pipe has room for a multiple of these, and each is written at once, so none is cut.
        heard = os.read(self._told, 1024 * TOLD.size)
        if not heard:
            raise WorkerGoneError
        for (what,) in TOLD.iter_unpack(heard):
            if what == TAKEN:
                self._on_the_way -= 1
            else:
                self._free.append(what)


def _ready(waiting: deque[_Asked]) -> Iterator[bytes]:
    while waiting and (answer := waiting[0].answer) is not None:
        waiting.popleft()
        yield answer


def _chunks(items: Iterable[Document | Reject | Dropped], most: int) -> Iterator[list[Document | Reject | Dropped]]:
    chunk: list[Document | Reject | Dropped] = []
    size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item, Document):
            size += sum(len(span.data) for span in item.spans)
        if len(chunk) >= most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
