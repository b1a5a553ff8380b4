"""One process that reads and hands out to decoders: `python -m pipelines.tokenize.reader MEMORY TOLD`, started by
`pipelines.tokenize.reading`.

Enters, on standard input, as pickles of our own parent: sources, a `Preparation`, the number of decoders and the places
in the shared memory, then units, each as its source, its slices and how many documents a chunk may have. Leaves, on standard
output: for each its chunks, as decoders have answered, or the error that came in their place, and zero bytes behind the last
one. Always holds: it ends when its input does, and its decoders with it.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence

from pipelines.corpus.documents import Slice
from pipelines.corpus.reader import Reader
from pipelines.tokenize.decoders import Decoders
from pipelines.tokenize.pipes import WorkerGoneError, channels, put, sendable


def main() -> None:
    memory, told = map(int, sys.argv[1:])
    given, answer = channels()
    decoders: Decoders | None = None
    try:
        try:
            sources, preparation, count, places = pickle.load(given)
            decoders = Decoders(preparation, count, memory=memory, places=places, told=told)
        except Exception as error:
            # In place of the first unit's documents.
            put(answer, pickle.dumps(sendable(error), 5))
            return
        while True:
            source, slices, most = pickle.load(given)
            for data in _answers(decoders, sources[source], source, slices, most):
                put(answer, data)
            put(answer, b"")
    except (EOFError, pickle.UnpicklingError, BrokenPipeError, WorkerGoneError):
        # The worker has ended, or has given the unit up.
        pass
    finally:
        if decoders:
            decoders.close()


def _answers(decoders: Decoders, source: Reader, name: str, slices: Sequence[Slice], most: int) -> Iterator[bytes]:
    try:
        yield from decoders.answers(name, source.read(slices), most)
    except WorkerGoneError:
        raise
    except Exception as error:
        yield pickle.dumps(sendable(error), 5)


if __name__ == "__main__":
    main()
