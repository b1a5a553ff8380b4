"""The packed sequences of one dataset, epoch after epoch, from any position on.

Enters: an `Index`, a seed, a position. Leaves: parts of windows. Always holds: which sequence comes at a position follows
from index, seed and window size alone, and at most three windows are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from pipelines.loading.index import Index, Int64s
from pipelines.loading.packing import plan_window, windows
from pipelines.loading.windows import Window


@dataclass(frozen=True, slots=True)
class Position:
    """The next sequence of a dataset to be taken."""

    epoch: int = 0
    window: int = 0
    sequence: int = 0
    """Index among the window's sequences; their number means the start of the next window."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive sequences of one window."""

    window: Window
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Stream:
    """Gives sequences in order and knows where it is."""

    def __init__(
        self,
        index: Index,
        *,
        seed: int,
        window_tokens: int,
        endless: bool = True,
        position: Position = Position(),
        readers: Executor | None = None,
    ) -> None:
        """
        Args:
            index: with at least one piece, if the stream is endless.
            endless: go on with the next epoch; otherwise stop after one.
            position: where to begin.
            readers: reads the next window while the current one is used; None reads when tokens are needed.
        """
        self.position = position
        self._index, self._seed, self._window_tokens = index, seed, window_tokens
        self._endless, self._readers = endless, readers
        self._windows = self._made(position)
        self._current: tuple[int, int, Window] | None = None

    def take(self, count: int) -> list[Part]:
        """The next so many sequences; fewer where a stream of one epoch ends."""
        parts: list[Part] = []
        while count:
            if self._current is None:
                self._current = next(self._windows, None)
                if self._current is None:
                    break
            epoch, number, window = self._current
            here = (epoch, number) == (self.position.epoch, self.position.window)
            start = self.position.sequence if here else 0
            stop = min(start + count, window.plan.sequences)
            if start < stop:
                parts.append(Part(window, start, stop))
                count -= stop - start
                self.position = Position(epoch, number, stop)
            if stop == window.plan.sequences:
                self._current = None
        return parts

    def _made(self, position: Position) -> Iterator[tuple[int, int, Window]]:
        """(epoch, number, window) from a position on."""
        if self._readers is None:
            for epoch, number, blocks in self._drawn(position):
                yield epoch, number, self._plan(epoch, number, blocks)
            return
        ahead: deque[tuple[int, int, Future[Window]]] = deque()
        for epoch, number, blocks in self._drawn(position):
            ahead.append((epoch, number, self._readers.submit(self._read, epoch, number, blocks)))
            if len(ahead) > 1:
                epoch, number, window = ahead.popleft()
                yield epoch, number, window.result()
        for epoch, number, window in ahead:
            yield epoch, number, window.result()

    def _drawn(self, position: Position) -> Iterator[tuple[int, int, Int64s]]:
        """(epoch, number, blocks) of the windows from a position on."""
        epoch, number = position.epoch, position.window
        while self._endless or epoch == 0:
            drawn = windows(self._index, self._seed, epoch, self._window_tokens)
            for window in range(number, len(drawn)):
                yield epoch, window, drawn[window]
            epoch, number = epoch + 1, 0

    def _plan(self, epoch: int, number: int, blocks: Int64s) -> Window:
        return Window(self._index, blocks, plan_window(self._index, blocks, self._seed, epoch, number))

    def _read(self, epoch: int, number: int, blocks: Int64s) -> Window:
        return self._plan(epoch, number, blocks).load()
