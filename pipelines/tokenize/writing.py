"""A process that lays out and writes beside a worker whose GPU encodes.

Enters: a unit's windows of encoded documents. Leaves: its `WrittenShard`. Always holds: windows go through one pipe, so a
writer that is slow holds the worker up; what is half-written goes when the unit fails, unless the process was killed (then
`braid vacuum` finds it, as after a killed worker); and the process ends with its worker.

Why a process: NumPy gives Python's lock away in each operation on more than 500 numbers, and beside the threads that read,
stage and encode it takes long to come back.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from pipelines.sequence import Vocabulary
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.layout import Encoded
from pipelines.tokenize.pipes import answer_of, send, started
from pipelines.tokenize.units import WorkUnit


class WritingProcess:
    """Writes units of one dataset, one after another, and is kept from unit to unit.

    Args:
        dataset: folder or URI.
    """

    def __init__(self, dataset: str, vocabulary: Vocabulary) -> None:
        self._dataset, self._vocabulary = dataset, vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()

    def write(self, unit: WorkUnit, windows: Iterable[Encoded]) -> WrittenShard:
        """Write a unit. Another thread may meanwhile give another one, whose turn comes then.

        Raises:
            TransientError: the process ended, such as for want of memory.
            Exception: what it met while it wrote, or what making the windows raised.
        """
        windows = iter(windows)
        # Whose first window is there has everything before it done, or in its hands: two units cannot wait for each other.
        first = list(islice(windows, 1))
        with self._turn:
            return self._written(unit, chain(first, windows))

    def _written(self, unit: WorkUnit, windows: Iterator[Encoded]) -> WrittenShard:
        process = self._process = self._process or self._started()
        try:
            answer = self._asked(process, unit, windows)
        except BaseException:
            self.close()
            raise
        if isinstance(answer, WrittenShard):
            return answer
        self.close()
        if isinstance(answer, str):
            raise RuntimeError(f"while unit {unit.id} was written:\n{answer}")
        raise answer

    def close(self) -> None:
        """End the process, which takes away what it has half-written, and wait for it."""
        if self._process:
            process, self._process = self._process, None
            process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        process = started("pipelines.tokenize.writer")
        send(process, (self._dataset, self._vocabulary))
        return process

    def _asked(
        self, process: subprocess.Popen[bytes], unit: WorkUnit, windows: Iterator[Encoded]
    ) -> WrittenShard | Exception | str:
        # Nothing but the pipes is guarded: what making the windows raises is no fault of the process.
        listening = _heard(process, (unit.id, unit.record()))
        for window in windows:
            if not (listening := listening and _heard(process, window)):
                break
        if listening:
            _heard(process, None)
        answer: WrittenShard | Exception | str = pickle.loads(
            answer_of(process, "the process that writes", f"unit {unit.id}")
        )
        return answer


def _heard(process: subprocess.Popen[bytes], message: object) -> bool:
    """Whether the process took a message; if not it has ended, and has perhaps said why."""
    try:
        send(process, message)
    except BrokenPipeError:
        return False
    return True
