"""One process that lays out and writes: `python -m pipelines.tokenize.writer`, started by `pipelines.tokenize.writing`.

Enters, on standard input, as pickles of our own parent: dataset and vocabulary, then for each unit its id and record, its
windows, and None, or that it is given up. Leaves, on standard output, in the same order: a `WrittenShard` for each, or the
error that ended it. Always holds: while a unit is compressed and published the next one is laid out; the process ends when
its input does, and takes what is half-written with it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
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
            except EOFError:
                return
            try:
                finish = _laid_out(storage, vocabulary, unit, record, _Windows(given))
            except WorkerGoneError:
                return
            # The next unit begins to be laid out; the one after it waits in the parent.
            beside.submit(_answer, answers, finish)


def _answer(answers: BinaryIO, finish: Callable[[], WrittenShard | Exception | str]) -> None:
    put(answers, pickle.dumps(finish(), 5))


class _Windows:
    """Those of one unit, until its end."""

    def __init__(self, given: BinaryIO) -> None:
        self._given, self._ended = given, False

    def __iter__(self) -> Iterator[Encoded]:
        while not self._ended:
            try:
                window = pickle.load(self._given)
            except (EOFError, pickle.UnpicklingError) as error:
                raise WorkerGoneError from error
            self._ended = window is None or window == GIVEN_UP
            if window == GIVEN_UP:
                raise GivenUpError
            if not self._ended:
                yield window

    def skip(self) -> None:
        """Those that have not been looked at."""
        with suppress(GivenUpError):
            for _ in self:
                pass


def _laid_out(
    storage: Storage, vocabulary: Vocabulary, unit: str, record: dict[str, Any], windows: _Windows
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
        windows.skip()
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
