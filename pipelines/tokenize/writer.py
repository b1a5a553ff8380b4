"""One process that lays out and writes: `python -m pipelines.tokenize.writer`, started by `pipelines.tokenize.writing`.

Enters, on standard input, as pickles of our own parent: dataset and vocabulary, then for each unit its id and record, its
windows, and None, or that it is given up. Leaves, on standard output, in the same order: a `WrittenShard` for each, or the
error that ended it. Always holds: while a unit is compressed and published the next one is laid out; the process ends when
its input does, and takes what has not been laid out to its end with it.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, BinaryIO

from pipelines.sequence import Vocabulary
from pipelines.shards.storage import Storage
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.layout import Encoded, rows_of
from pipelines.tokenize.pipes import GIVEN_UP, GivenUpError, WorkerGoneError, channels, put, sendable


def main() -> None:
    given, answers = channels()
    dataset, vocabulary = pickle.load(given)
    storage = Storage.of(dataset)
    with ThreadPoolExecutor(1, thread_name_prefix="braid-finish") as beside:
        while True:
            try:
                unit, record = pickle.load(given)
                finish = _laid_out(storage, vocabulary, unit, record, _windows(given))
            except EOFError:
                return
            except WorkerGoneError as error:
                if isinstance(error.__cause__, EOFError | pickle.UnpicklingError):
                    return
                raise
            # The next unit begins to be laid out; the one after it waits in the parent.
            beside.submit(_answer, answers, finish)


def _answer(answers: BinaryIO, finish: Callable[[], WrittenShard | Exception | str]) -> None:
    try:
        put(answers, pickle.dumps(finish(), 5))
    except BrokenPipeError:
        # The worker has ended, which ends the windows, too.
        return
    except BaseException:
        # The worker waits for an answer, or for the end of this process.
        traceback.print_exc()
        os._exit(1)


def _windows(given: BinaryIO) -> Generator[Encoded, None, None]:
    while True:
        try:
            window = pickle.load(given)
        except Exception as error:
            # Whatever it is, where the next message begins is not known.
            raise WorkerGoneError from error
        if window == GIVEN_UP:
            raise GivenUpError
        if window is None:
            return
        yield window


def _laid_out(
    storage: Storage,
    vocabulary: Vocabulary,
    unit: str,
    record: dict[str, Any],
    windows: Generator[Encoded, None, None],
) -> Callable[[], WrittenShard | Exception | str]:
    """Take a unit's windows; what is returned does the rest, and gives the answer."""
    try:
        with ExitStack() as opened:
            writer = opened.enter_context(ShardWriter(storage, vocabulary, unit, record, beside=True))
            writer.take(rows_of(windows, vocabulary))
            rest = opened.pop_all()
    except WorkerGoneError:
        raise
    except Exception as error:
        failed = sendable(error)
        # What is left of the unit is read past.
        with suppress(GivenUpError):
            for _ in windows:
                pass
        return lambda: failed

    def finish() -> WrittenShard | Exception | str:
        try:
            with rest:
                return writer.finish()
        except Exception as error:
            return sendable(error)

    return finish


if __name__ == "__main__":
    main()
