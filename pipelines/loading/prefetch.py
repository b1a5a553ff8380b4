"""Make items ahead on one thread, so that reading and packing hide behind the training step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """An iterator over another one's items, up to `depth` of them made ahead.

    An exception of the source is raised where its item would have come. Close it, or its thread stays.
    """

    def __init__(self, source: Iterator[Item], depth: int, name: str = "braid-loader") -> None:
        self._source = source
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            try:
                raise item
            finally:
                # Else the error's traceback would hold this frame, and this frame the error.
                del item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed.set()
        while self._thread.is_alive():
            # The thread may be waiting for room in the queue.
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.05)

    def _run(self) -> None:
        try:
            for item in self._source:
                self._ready.put(item)
                # Else it would stay in memory until the next one is there.
                del item
                if self._closed.is_set():
                    return
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)
