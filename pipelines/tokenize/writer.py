"""One process that lays out and writes: `python -m pipelines.tokenize.writer`, started by `pipelines.tokenize.writing`.

Enters, on standard input, as pickles of our own parent: dataset and vocabulary, then for each unit its id and record, its
windows, and None. Leaves, on standard output: a `WrittenShard` for each, or the error that ended it, with which the process
ends, too. Always holds: it ends when its input does, and takes what is half-written with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter
from pipelines.tokenize.layout import Encoded, rows_of
from pipelines.tokenize.pipes import WorkerGoneError, channels, put, sendable


def main() -> None:
    given, answer = channels()
    dataset, vocabulary = pickle.load(given)
    storage = Storage.of(dataset)
    while True:
        try:
            unit, record = pickle.load(given)
        except EOFError:
            return
        try:
            with ShardWriter(storage, vocabulary, unit, record, beside=True) as writer:
                writer.take(rows_of(_windows(given), vocabulary))
                written = writer.finish()
        except WorkerGoneError:
            return
        except Exception as error:
            put(answer, pickle.dumps(sendable(error), 5))
            return
        put(answer, pickle.dumps(written, 5))


def _windows(given: BinaryIO) -> Iterator[Encoded]:
    while True:
        try:
            window = pickle.load(given)
        except (EOFError, pickle.UnpicklingError) as error:
            raise WorkerGoneError from error
        if window is None:
            return
        yield window


if __name__ == "__main__":
    main()
