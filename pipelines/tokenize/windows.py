"""Documents on their way to the tokenizers, and how many go at once.

Enters: what `prepare` makes of documents. Leaves: windows of them. Always holds: what goes to the tokenizers lies apart from
what goes on to the rows, so a window can let go of its media while it waits for their codes; and the order is kept.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray

from pipelines.sequence import Modality
from pipelines.tokenize.prepare import Item, Prepared


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSize:
    """Documents are encoded in windows of at most so many, or so many bytes of decoded media and text; a chunk that alone
    has more makes a window of its own."""

    documents: int
    size: int
    first: int | None = None
    """Documents of a unit's first window, where that is smaller; from there each has twice as many as the one before."""


Items = list[Item] | bytes
"""Documents without what goes to the tokenizers. As a pickle where a process made them: they are for another one to read."""


@dataclass(slots=True)
class Chunk:
    """Some documents, one after another."""

    items: Items
    documents: int
    size: int
    """Bytes of what goes to the tokenizers."""
    texts: list[str] = field(default_factory=list)
    pictures: list[NDArray[Any]] = field(default_factory=list)
    """uint8 [H, W, 3] each."""
    sounds: list[NDArray[Any]] = field(default_factory=list)
    """float32 [samples] each."""

    @classmethod
    def of(cls, items: list[Item]) -> Chunk:
        """Take documents apart."""
        documents = [item for item in items if isinstance(item, Prepared)]
        chunk = cls(
            [item.emptied() if isinstance(item, Prepared) else item for item in items],
            len(items),
            sum(item.size for item in documents),
        )
        payloads: dict[Modality, list[Any]] = {
            Modality.TEXT: chunk.texts, Modality.IMAGE: chunk.pictures, Modality.AUDIO: chunk.sounds
        }  # fmt: skip
        for item in documents:
            for part in item.parts:
                if not part.encoded:
                    payloads[part.modality].append(part.payload)
        return chunk

    def pickled(self) -> Chunk:
        """With its items as a pickle."""
        return replace(self, items=pickle.dumps(self.items, 5))


def items_of(chunks: Iterable[Items]) -> list[Item]:
    """All items of a window."""
    return [item for items in chunks for item in (pickle.loads(items) if isinstance(items, bytes) else items)]


def windows_of(
    chunks: Iterable[Chunk], most: WindowSize, in_a_hurry: Callable[[], bool] = lambda: True
) -> Generator[list[Chunk], None, None]:
    """Neighbouring chunks together.

    Args:
        in_a_hurry: asked when the first chunk is there: whether the first window shall be small, if it may be.
    """
    window: list[Chunk] = []
    documents, size, wanted = 0, 0, 0
    for chunk in chunks:
        wanted = wanted or (most.first if most.first and in_a_hurry() else most.documents)
        if window and (documents + chunk.documents > wanted or size + chunk.size > most.size):
            yield window
            window, documents, size, wanted = [], 0, 0, min(2 * wanted, most.documents)
        window.append(chunk)
        documents, size = documents + chunk.documents, size + chunk.size
        # A full one need not wait for the next chunk, and nothing but the window holds its media.
        del chunk
        if documents == wanted:
            yield window
            window, documents, size, wanted = [], 0, 0, min(2 * wanted, most.documents)
    if window:
        yield window
