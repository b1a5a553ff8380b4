"""A process that lays out and writes beside a worker whose GPU encodes.

Enters: a unit's windows of encoded documents. Leaves: its `WrittenShard`. Always holds: windows go through one pipe, so a
writer that is slow holds the worker up; while a unit is compressed and published the next one is laid out; what is
half-written goes when the unit fails, unless the process was killed (then `braid vacuum` finds it, as after a killed
worker); and the process ends with its worker.

Why a process: NumPy gives Python's lock away in each operation on more than 500 numbers, and beside the threads that read,
stage and encode it takes long to come back.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice

from pipelines.corpus.errors import TransientError
from pipelines.sequence import Vocabulary
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.layout import Encoded
from pipelines.tokenize.pipes import GIVEN_UP, answer_of, send, started
from pipelines.tokenize.units import WorkUnit


class WritingProcess:
    """Writes units of one dataset, and is kept from unit to unit.

    Args:
        dataset: folder or URI.
    """

    def __init__(self, dataset: str, vocabulary: Vocabulary) -> None:
        self._dataset, self._vocabulary = dataset, vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._giving, self._answers = threading.Lock(), threading.Lock()
        """Whose windows go to the process, and whose answer comes next."""

    def write(self, unit: WorkUnit, windows: Iterable[Encoded]) -> WrittenShard:
        """Write a unit. Other threads may give others meanwhile: the next one is taken while this one is finished.

        Raises:
            TransientError: the process ended, such as for want of memory.
            Exception: what it met while it wrote, or what making the windows raised.
        """
        windows = iter(windows)
        # Whose first window is there has everything before it done, or in its hands: two units cannot wait for each other.
        first = list(islice(windows, 1))
        with self._giving:
            process = self._running()
            self._give(process, unit, chain(first, windows))
            # Before another unit is given, for answers come in this order.
            self._answers.acquire()
        try:
            answer = _answer(process, unit)
        finally:
            self._answers.release()
        if isinstance(answer, WrittenShard):
            return answer
        if isinstance(answer, str):
            raise RuntimeError(f"while unit {unit.id} was written:\n{answer}")
        raise answer

    def close(self) -> None:
        """End the process, and wait for it. What it has not laid out to its end it takes away."""
        if self._process:
            process, self._process = self._process, None
            process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            process = started("pipelines.tokenize.writer")
            _heard(process, (self._dataset, self._vocabulary))
            self._process = process
        return self._process

    def _give(self, process: subprocess.Popen[bytes], unit: WorkUnit, windows: Iterator[Encoded]) -> None:
        """The windows of a unit, to their end or that of the process, whose answer says so."""
        window: object = (unit.id, unit.record())
        while _heard(process, window) and window is not None:
            try:
                window = next(windows, None)
            except BaseException:
                # Nothing of the unit is left when the error is told, unless the process dies now.
                if _heard(process, GIVEN_UP):
                    with suppress(TransientError), self._answers:
                        _answer(process, unit)
                raise


def _heard(process: subprocess.Popen[bytes], message: object) -> bool:
    """Whether the process took a message; if not it has ended."""
    try:
        send(process, message)
    except BrokenPipeError:
        process.wait()
        return False
    except BaseException:
        # It may have half of the message, and would take the next one for the rest.
        process.kill()
        process.wait()
        raise
    return True


def _answer(process: subprocess.Popen[bytes], unit: WorkUnit) -> WrittenShard | Exception | str:
    answer: WrittenShard | Exception | str = pickle.loads(
        answer_of(process, "the process that writes", f"unit {unit.id}")
    )
    return answer
