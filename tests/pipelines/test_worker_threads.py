"""A unit whose reading, decoding, encoding and writing run on threads, as on a GPU: the same rows, and no thread is left."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.corpus.documents import Reject
from pipelines.shards.schema import Row
from pipelines.tokenize.ahead import mapped
from pipelines.tokenize.units import WorkUnit, grouped
from pipelines.tokenize.worker import UnitWorker, Window
from tests.pipelines.tiny import tiny_recipe


@pytest.fixture
def worker(tmp_path: Path) -> UnitWorker:
    return UnitWorker(tiny_recipe(tmp_path))


def units(worker: UnitWorker) -> list[WorkUnit]:
    return [
        unit for source in worker.recipe.sources for unit in grouped(source.name, source.inputs(), worker.recipe.units)
    ]


def results(worker: UnitWorker) -> Iterator[tuple[str, list[int] | str]]:
    for unit in units(worker):
        for item in worker.rows(unit):
            what = item.sequence.token_ids.tolist() if isinstance(item, Row) else item.reason
            yield item.source, what


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("braid-")]


def damage(worker: UnitWorker, documents: int) -> Callable[[], int]:
    """Let preparing fail from the n-th document on; how many were prepared."""
    prepare, seen = worker._prepare, []

    def failing(*arguments: object) -> object:
        seen.append(arguments)
        if len(seen) > documents:
            raise RuntimeError("the store is gone")
        return prepare(*arguments)  # type: ignore[arg-type]

    worker._prepare = failing  # type: ignore[assignment, method-assign]
    return lambda: len(seen)


@pytest.mark.parametrize("window", [Window(documents=256, size=2**28), Window(documents=3, size=2000)])
def test_threads_change_no_row_and_no_order(worker: UnitWorker, window: Window) -> None:
    expected = list(results(worker))
    worker.decoders, worker.window = 4, window
    assert list(results(worker)) == expected
    assert len(expected) == 42
    assert own_threads() == []


def test_an_error_on_a_thread_reaches_the_caller_after_what_came_before(worker: UnitWorker) -> None:
    expected = list(results(worker))
    worker.decoders, worker.window = 2, Window(documents=2, size=2**20)
    damage(worker, 11)
    found = []
    with pytest.raises(RuntimeError, match="the store is gone"):
        found.extend(results(worker))
    assert found == expected[: len(found)]
    assert own_threads() == []


def test_a_caller_that_stops_leaves_no_thread_and_little_was_done_ahead(worker: UnitWorker) -> None:
    worker.decoders, worker.window = 2, Window(documents=1, size=2**20)
    prepared = damage(worker, 10**6)
    rows = worker.rows(max(units(worker), key=lambda unit: unit.size))
    assert not isinstance(next(rows), Reject)
    rows.close()  # type: ignore[attr-defined]
    assert own_threads() == []
    assert prepared() <= 20


def test_mapping_is_in_order_and_bounded() -> None:
    given: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            given.append(number)
            yield number

    found = mapped(lambda number: number * number, items(), 3)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(given) <= 5 + 4 * 3 + 1
    assert list(found) == [number * number for number in range(5, 100)]
