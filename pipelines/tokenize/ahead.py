"""Work that runs ahead of its use, on threads, in order.

Enters: an iterator. Leaves: what a function makes of its items, in their order. Always holds: a bounded number of items is
under way; an error is raised where its item would have come; and no thread outlives the loop that it works for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from pipelines.loading.prefetch import Prefetcher

A = TypeVar("A")
B = TypeVar("B")

_WAITING = 2
"""Items under way for each thread, so that a slow one holds the others up but little."""


def mapped(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map` on so many threads; on one it is `map` itself."""
    if threads == 1:
        yield from map(function, items)
        return
    under_way: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="braid-decode") as pool:
        try:
            for item in items:
                under_way.append(pool.submit(function, item))
                if len(under_way) > _WAITING * threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def ahead(items: Generator[A, None, None], name: str, depth: int = 1) -> Generator[A, None, None]:
    """The items, made on a thread of their own, up to `depth` of them before they are asked for."""
    try:
        with closing(Prefetcher(items, depth, f"braid-{name}")) as made:
            yield from made
    finally:
        items.close()
