"""One process that decodes: `python -m pipelines.tokenize.decoder FD`, started by `pipelines.tokenize.decoders`.

Enters, on standard input: a `Preparation`, then source, place and documents again and again, as pickles of our own parent.
Leaves, on standard output: for each what `prepare` makes of the documents; arrays lie at the place in the shared memory FD,
or come along where they do not fit. Always holds: it ends when its input does, so also when its parent is killed.
"""

from __future__ import annotations

import mmap
import pickle
import sys
import traceback

from pipelines.corpus.errors import TransientError
from pipelines.tokenize.pipes import channels
from pipelines.tokenize.prepare import Preparation

_ALIGNMENT = 64

Place = tuple[int, int]
"""Where a chunk's arrays may lie in the shared memory: first byte and length."""


def main() -> None:
    memory = mmap.mmap(int(sys.argv[1]), 0)
    given, answer = channels()
    preparation: Preparation = pickle.load(given)
    while True:
        try:
            source, (start, length), documents = pickle.load(given)
        except EOFError:
            return
        buffers: list[pickle.PickleBuffer] = []
        try:
            found: object = [preparation.prepare(source, document) for document in documents]
        except TransientError as error:
            found = error
        except Exception:
            # No fault of the data is raised here: whoever asked shall see what is wrong with the program.
            found = traceback.format_exc()
        data = pickle.dumps(found, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = [view.nbytes for view in views]
        fits = sum(aligned(size) for size in sizes) <= length
        at = start
        for view in views if fits else ():
            memory[at : at + view.nbytes] = view
            at += aligned(view.nbytes)
        pickle.dump((data, sizes, None if fits else [bytearray(view) for view in views]), answer, protocol=5)
        answer.flush()


def aligned(size: int) -> int:
    """Bytes that an array takes in shared memory."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


if __name__ == "__main__":
    main()
