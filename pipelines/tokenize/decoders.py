"""Processes that decode beside a worker whose GPU encodes: Python's lock would let threads do one thing at a time.

Enters: documents. Leaves: what `prepare` makes of them, in order, arrays in shared memory. Always holds: a bounded number of
documents is under way; the memory has no name, so nothing is left of it however the processes end; and a decoder ends with
its worker.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np

from pipelines.corpus.documents import Document, Dropped, Reject
from pipelines.corpus.errors import TransientError
from pipelines.tokenize.ahead import mapped
from pipelines.tokenize.decoder import Place, aligned
from pipelines.tokenize.pipes import send, started
from pipelines.tokenize.prepare import Item, Preparation

CHUNK_DOCUMENTS = 16
CHUNK_BYTES = 4 * 2**20
"""Documents that go to a decoder at once: a message costs as much as decoding a small picture. A chunk ends with the document
that fills so many bytes of its files."""

PLACE_BYTES = 2**24
"""Of shared memory for the arrays of one chunk. What does not fit comes through a pipe."""

PLACES = 160
"""Enough for the windows in memory. Where none is free, arrays come through pipes."""

_SWITCH_S = 2e-4


class Decoders:
    """A number of decoding processes, kept from unit to unit."""

    def __init__(self, preparation: Preparation, count: int) -> None:
        # Threads that talk to decoders hold Python's lock for microseconds; one that computes would let them wait for 5 ms.
        sys.setswitchinterval(_SWITCH_S)
        self._count = count
        self._preparation = preparation
        self._descriptor = os.memfd_create("braid")
        os.ftruncate(self._descriptor, PLACES * PLACE_BYTES)
        self._memory = mmap.mmap(self._descriptor, 0)
        self._free: list[Place] = [(number * PLACE_BYTES, PLACE_BYTES) for number in reversed(range(PLACES))]
        """The last one that became free is taken first: its pages are there, and in the caches."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        process = started("pipelines.tokenize.decoder", self._descriptor)
        self._processes.append(process)
        send(process, self._preparation)
        self._idle.put(process)

    def _replace(self, ended: subprocess.Popen[bytes]) -> None:
        """Start another one in the place of one that has ended."""
        try:
            self._start()
        except OSError:
            # There is no memory for one now. Who gets this one will fail as its last one did, and not wait for ever.
            self._idle.put(ended)
            raise
        ended.kill()
        ended.communicate()
        self._processes.remove(ended)

    def close(self) -> None:
        """End the processes and wait for them."""
        for process in self._processes:
            process.kill()
            process.communicate()
        os.close(self._descriptor)

    def prepared(self, source: str, items: Iterable[Document | Reject | Dropped]) -> Iterator[Item]:
        """What becomes of the items of a source, in order.

        Raises:
            TransientError: a decoder ended, such as for want of memory.
        """
        chunks = mapped(lambda chunk: self._decode(source, chunk), _chunks(items), self._count)
        for chunk in chunks:
            yield from chunk

    def _decode(self, source: str, items: list[Document | Reject | Dropped]) -> list[Item]:
        documents = [item for item in items if isinstance(item, Document)]
        decoded = iter(self._ask(source, documents) if documents else [])
        return [next(decoded) if isinstance(item, Document) else item for item in items]

    def _ask(self, source: str, documents: list[Document]) -> list[Item]:
        try:
            place = self._free.pop()
        except IndexError:
            place = (0, 0)
        process = self._idle.get()
        try:
            send(process, (source, place, documents))
            assert process.stdout
            data, sizes, buffers = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            if place[1]:
                self._free.append(place)
            self._replace(process)
            raise TransientError(
                f"a decoder ended with exit code {process.wait()}, at one of the {len(documents)} documents from "
                f"{documents[0].source} on; if it was for want of memory, lower cluster.cpus_per_worker"
            ) from error
        self._idle.put(process)
        if place[1]:
            base = np.frombuffer(self._memory, np.uint8, place[1], place[0])
            # The place is free again when the last array in it is gone.
            weakref.finalize(base, self._free.append, place)
            if buffers is None:
                starts = [0, *accumulate(aligned(size) for size in sizes)][: len(sizes)]
                buffers = [base.data[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        found: list[Item] | TransientError | str = pickle.loads(data, buffers=buffers)
        if isinstance(found, TransientError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(f"at one of the {len(documents)} documents from {documents[0].source} on:\n{found}")
        return found


def _chunks(items: Iterable[Document | Reject | Dropped]) -> Iterator[list[Document | Reject | Dropped]]:
    chunk: list[Document | Reject | Dropped] = []
    size = 0
    for item in items:
        chunk.append(item)
        if isinstance(item, Document):
            size += sum(len(span.data) for span in item.spans)
        if len(chunk) >= CHUNK_DOCUMENTS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
