"""A process that reads and hands out to decoders, beside a worker whose GPU encodes.

Enters: units. Leaves: their chunks, in order, media decoded, arrays in shared memory. Always holds: a bounded number of
chunks is under way; the memory has no name, so nothing is left of it however the processes end; and they end with their
worker.

Why a process: reading a tar's members and speaking to a dozen decoders takes Python's lock a thousand times a second, and
with it the turn from the thread that launches the GPU's kernels, which asks for it after each.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Generator, Mapping
from contextlib import suppress

import numpy as np

from pipelines.corpus.reader import Reader
from pipelines.tokenize.decoder import Answer, Place, starts
from pipelines.tokenize.decoders import TAKEN, TOLD
from pipelines.tokenize.pipes import answer_of, send, started
from pipelines.tokenize.prepare import Preparation
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.windows import Chunk

PLACE_BYTES = 2**26
"""Of shared memory for the arrays of one chunk, such as 16 sounds of 40 s. What does not fit comes through pipes."""

PLACES = 320
"""Enough for the windows in memory. Memory is taken only for those that are used, and as much of each as was needed."""

_SWITCH_S = 2e-4
_END_S = 5.0
"""For a process that is to end by itself."""


class ReadingProcess:
    """Reads units of a job's sources, one after another, and is kept from unit to unit.

    Args:
        sources: by name, as the job uses them.
    """

    def __init__(self, sources: Mapping[str, Reader], preparation: Preparation) -> None:
        self.sources, self.preparation = dict(sources), preparation
        self._turn = threading.Lock()
        self._beside: _Beside | None = None

    def chunks(self, unit: WorkUnit, decoders: int, most: int) -> Generator[Chunk, None, None]:
        """The chunks of a unit. Another thread may meanwhile ask for another unit's, whose turn comes then.

        Args:
            decoders: processes that decode, if none are there yet.
            most: documents of a chunk.

        Raises:
            TransientError: a process ended, such as for want of memory.
            Exception: what reading raised.
        """
        with self._turn:
            self._beside = self._beside or _Beside(self.sources, self.preparation, decoders)
            try:
                yield from self._beside.chunks(unit, most)
            except BaseException:
                # It may be in the middle of a unit that nobody wants any more.
                self.close()
                raise

    def close(self) -> None:
        """End the process and its decoders, and wait for them."""
        if self._beside:
            beside, self._beside = self._beside, None
            beside.close()


class _Beside:
    """One such process, and the memory that it shares with us."""

    def __init__(self, sources: Mapping[str, Reader], preparation: Preparation, decoders: int) -> None:
        # Threads hold Python's lock for microseconds; one that computes would let them wait for 5 ms.
        sys.setswitchinterval(_SWITCH_S)
        memory, (told, tell) = os.memfd_create("braid"), os.pipe()
        self._tell = os.fdopen(tell, "wb", buffering=0)
        self._telling = threading.RLock()
        """Arrays are let go of by any thread, at any time, also in the middle of telling."""
        try:
            os.ftruncate(memory, PLACES * PLACE_BYTES)
            self._memory = mmap.mmap(memory, 0)
            self.process = started("pipelines.tokenize.reader", memory, told)
        finally:
            os.close(memory)
            os.close(told)
        places = [Place(number, number * PLACE_BYTES, PLACE_BYTES) for number in range(PLACES)]
        with suppress(BrokenPipeError):
            send(self.process, (sources, preparation, decoders, places))

    def chunks(self, unit: WorkUnit, most: int) -> Generator[Chunk, None, None]:
        # What has ended it is seen when it is listened to.
        with suppress(BrokenPipeError):
            send(self.process, (unit.source, unit.slices, most))
        while data := answer_of(self.process, "the process that reads", f"unit {unit.id}"):
            self._say(TAKEN)
            yield self._chunk(data)

    def close(self) -> None:
        """End it, and with it its decoders. It is waited for, unless a file that it waits for does not come."""
        assert self.process.stdin
        assert self.process.stdout
        with self._telling:
            self._tell.close()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _chunk(self, data: bytes) -> Chunk:
        answer: Answer | Exception | str = pickle.loads(data)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(answer)
        place, sizes, buffers, pickled = answer
        views: list[memoryview] | list[bytearray] = buffers or []
        if place:
            base = np.frombuffer(self._memory, np.uint8, place.size, place.start)
            # The place is free again when the last array in it is gone.
            weakref.finalize(base, self._say, place.number)
            if buffers is None:
                views = [base.data[start : start + size] for start, size in zip(starts(sizes), sizes, strict=True)]
        chunk: Chunk = pickle.loads(pickled, buffers=views)
        return chunk

    def _say(self, what: int) -> None:
        # It may have ended, or been ended, and needs to know nothing then.
        with self._telling, suppress(BrokenPipeError, ValueError):
            self._tell.write(TOLD.pack(what))
