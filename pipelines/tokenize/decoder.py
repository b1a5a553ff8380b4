"""One process that decodes: `python -m pipelines.tokenize.decoder FD`, started by `pipelines.tokenize.decoders`.

Enters, on standard input: a `Preparation`, then source, place and items again and again, as pickles of our own parent.
Leaves, on standard output: for each the `Chunk` that `prepare` makes of the documents among them; arrays lie at the place in
the shared memory FD, or come along where they do not fit. Always holds: it ends when its input does, so also when its parent
is killed.
"""

from __future__ import annotations

import mmap
import pickle
import sys
import traceback
from itertools import accumulate
from typing import NamedTuple

from pipelines.corpus.documents import Document, Dropped, Reject
from pipelines.corpus.errors import TransientError
from pipelines.tokenize.pipes import channels, put
from pipelines.tokenize.prepare import Preparation
from pipelines.tokenize.windows import Chunk

_ALIGNMENT = 64


class Place(NamedTuple):
    """Where a chunk's arrays may lie in the shared memory."""

    number: int
    start: int
    size: int


Answer = tuple[Place | None, list[int], list[bytearray] | None, bytes]
"""The place that was given, sizes of arrays, the arrays where they do not lie there, and the pickle around them."""


def main() -> None:
    memory = mmap.mmap(int(sys.argv[1]), 0)
    given, answer = channels()
    try:
        preparation: Preparation = pickle.load(given)
        while True:
            put(answer, answered(preparation, memory, *pickle.load(given)))
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        return


def answered(
    preparation: Preparation,
    memory: mmap.mmap,
    source: str,
    place: Place | None,
    items: list[Document | Reject | Dropped],
) -> bytes:
    """A pickled `Answer`, or the error instead of it."""
    try:
        chunk = Chunk.of([preparation.prepare(source, item) for item in items]).pickled()
    except TransientError as error:
        return pickle.dumps(error, 5)
    except Exception:
        # No fault of the data is raised here: whoever asked shall see what is wrong with the program.
        where = f"at one of the {len(items)} documents from {items[0].source} on"
        return pickle.dumps(f"{where}:\n{traceback.format_exc()}", 5)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(chunk, 5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    answer: Answer
    if place and sum(map(aligned, sizes)) <= place.size:
        for view, start in zip(views, starts(sizes), strict=True):
            memory[place.start + start : place.start + start + view.nbytes] = view
        answer = (place, sizes, None, data)
    else:
        answer = (place, sizes, [bytearray(view) for view in views], data)
    return pickle.dumps(answer, 5)


def starts(sizes: list[int]) -> list[int]:
    """Where each of some arrays lies behind the others."""
    return [0, *accumulate(map(aligned, sizes))][: len(sizes)]


def aligned(size: int) -> int:
    """Bytes that an array takes in shared memory."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


if __name__ == "__main__":
    main()
