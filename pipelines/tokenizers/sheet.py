"""Parts of the sheets of `braid tokenizer check` that all three kinds of tokenizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Watch = Callable[[str, int, int], None]
"""Told what is going on, how many items are done, and of how many."""


class CheckError(ValueError):
    """A sheet cannot be made; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a sheet is made from."""

    tokenizer: str
    """A name, a folder, or a SentencePiece model's file."""
    data: Path
    """A file or a folder, which is read recursively."""
    limit: int
    """Items that the figures are about, evenly chosen from all: pictures, sounds, or lines of text."""
    items: int
    """Of those, shown."""
    device: str = "cpu"
    watch: Watch = lambda what, done, total: None


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many items, the first and the last among them, evenly spread."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(len(items), count)).round().astype(int)]
