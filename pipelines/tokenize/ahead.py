"""Work that runs ahead of its use, on threads, in order.

Enters: an iterator. Leaves: its items, in their order. Always holds: a bounded number of items is under way; an error is
raised where its item would have come; and no thread outlives the loop that it works for.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import TypeVar

from pipelines.loading.prefetch import Prefetcher

A = TypeVar("A")


def ahead(items: Generator[A, None, None], name: str, depth: int = 1) -> Generator[A, None, None]:
    """The items, made on a thread of their own, up to `depth` of them before they are asked for."""
    try:
        with closing(Prefetcher(items, depth, f"braid-{name}")) as made:
            yield from made
    finally:
        items.close()


def in_turn(items: Generator[A, None, None], turn: threading.Lock) -> Generator[A, None, None]:
    """The items; others that want this turn wait from the first one on until the last one is done with. Closing this closes
    them.

    Where units go through stages, each with its turn, whoever has the turn of a stage has passed the stages before, or has
    their turns as well; so two units cannot wait for each other.
    """
    with closing(items):
        # In a list, for what is handed on must not stay in memory here.
        while first := list(islice(items, 1)):
            with turn:
                yield first.pop()
                yield from items
