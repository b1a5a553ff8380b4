"""A unit that is read, decoded, encoded and written at once, as on a GPU: the same rows, and nothing is left running."""

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.documents import Reject
from pipelines.corpus.errors import TransientError
from pipelines.sequence import Modality
from pipelines.shards.schema import Row
from pipelines.tokenize import decoders, pipes
from pipelines.tokenize.ahead import mapped
from pipelines.tokenize.decoders import Decoders
from pipelines.tokenize.layout import Codes
from pipelines.tokenize.prepare import Item, Part, Prepared
from pipelines.tokenize.units import WorkUnit, grouped
from pipelines.tokenize.worker import UnitWorker, Window, _windows
from tests.pipelines.tiny import tiny_recipe


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[UnitWorker]:
    worker = UnitWorker(tiny_recipe(tmp_path))
    yield worker
    worker.close()


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


def of(worker: UnitWorker) -> Decoders:
    assert worker._decoders
    return worker._decoders


@pytest.mark.parametrize(
    "window",
    [Window(documents=256, size=2**28), Window(documents=3, size=2000), Window(documents=40, size=2**28, first=1)],
)
def test_decoders_change_no_row_and_no_order(worker: UnitWorker, window: Window) -> None:
    expected = list(results(worker))
    worker.decoders, worker.window = 3, window
    assert list(results(worker)) == expected
    assert len(expected) == 42
    assert own_threads() == []
    assert len(of(worker)._free) == decoders.PLACES


def test_a_unit_that_a_process_writes_is_the_one_that_the_worker_writes(worker: UnitWorker) -> None:
    def written() -> list[tuple[int, int, dict[str, Any], pa.Table]]:
        shards = [worker.run(unit) for unit in units(worker)]
        folder = Path(worker.recipe.dataset) / "shards"
        return [(s.rows, s.rejects, s.statistics, pq.read_table(folder / s.name)) for s in shards]

    expected = written()
    worker.decoders = 2
    for _ in range(2):
        assert written() == expected
    assert leftovers(worker) == []


def test_a_killed_writer_fails_its_unit_and_the_next_try_goes_well(worker: UnitWorker) -> None:
    worker.decoders = 1
    unit = max(units(worker), key=lambda unit: unit.size)
    expected = worker.run(unit).rows

    def killing(unit: WorkUnit) -> Generator[tuple[list[Item], Codes], None, None]:
        for window in UnitWorker._windows(worker, unit):
            yield window
            assert worker._writing._process
            worker._writing._process.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_windows", killing)
        with pytest.raises(TransientError, match=rf"writes ended with exit code -9, at unit {unit.id}; .*cpus_per_wo"):
            worker.run(unit)
    assert own_threads() == []
    assert worker.run(unit).rows == expected


@pytest.mark.parametrize("error", [TransientError, BrokenPipeError, EOFError])
def test_a_unit_that_fails_before_it_is_written_leaves_nothing_behind(
    worker: UnitWorker, error: type[Exception]
) -> None:
    worker.decoders, worker.window = 1, Window(documents=1, size=2**20)
    unit = max(units(worker), key=lambda unit: unit.size)
    worker.run(unit)

    def failing(unit: WorkUnit) -> Generator[tuple[list[Item], Codes], None, None]:
        yield from itertools.islice(UnitWorker._windows(worker, unit), 2)
        raise error("the GPU fell off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_windows", failing)
        with pytest.raises(error, match="fell off"):
            worker.run(unit)
    assert leftovers(worker) == []
    assert worker.run(unit).rows


def test_what_keeps_the_writer_from_writing_is_told(worker: UnitWorker) -> None:
    worker.decoders = 1
    shards = Path(worker.recipe.dataset) / "shards"
    shards.parent.mkdir(parents=True)
    shards.touch()
    with pytest.raises(FileExistsError, match="shards"):
        worker.run(units(worker)[0])
    shards.unlink()
    assert worker.run(units(worker)[0]).name


def leftovers(worker: UnitWorker) -> list[Path]:
    return list(Path(worker.recipe.dataset).rglob("*.part"))


def test_windows_grow_from_a_small_first_one_up_to_their_bounds() -> None:
    def document(number: int) -> Prepared:
        return Prepared("", f"d{number}", 0, "", [Part(Modality.AUDIO, np.zeros(25, np.float32), "")], None)

    def lengths(window: Window) -> list[int]:
        return [len(found) for found in _windows(map(document, range(40)), window)]

    assert lengths(Window(documents=16, size=2**20)) == [16, 16, 8]
    assert lengths(Window(documents=16, size=2**20, first=3)) == [3, 6, 12, 16, 3]
    assert lengths(Window(documents=16, size=700, first=3)) == [3, 6, 7, 7, 7, 7, 3]


def test_a_window_that_is_begun_holds_no_media(worker: UnitWorker) -> None:
    media: list[weakref.ref[np.ndarray]] = []

    def window(unit: WorkUnit) -> list[Item]:
        items = list(worker._prepared(unit.source, worker._sources[unit.source].read(unit.slices)))
        parts = [part for item in items if isinstance(item, Prepared) for part in item.parts]
        media.extend(weakref.ref(part.payload) for part in parts if not isinstance(part.payload, str))
        return items

    for _, start in worker._staged(map(window, units(worker))):
        start()
        assert [ref() for ref in media if ref() is not None] == []
    assert media


def test_arrays_that_do_not_fit_or_find_no_place_come_through_pipes(
    worker: UnitWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(results(worker))
    monkeypatch.setattr(decoders, "PLACES", 2)
    monkeypatch.setattr(decoders, "PLACE_BYTES", 2**12)
    worker.decoders = 2
    assert list(results(worker)) == expected
    assert len(of(worker)._free) == 2


def test_a_killed_decoder_fails_its_unit_and_the_next_try_goes_well(worker: UnitWorker) -> None:
    expected = list(results(worker))
    worker.decoders = 1
    assert list(results(worker)) == expected
    (process,) = of(worker)._processes
    process.kill()
    with pytest.raises(TransientError, match=r"a decoder ended with exit code -9, at one of the .*cpus_per_worker"):
        list(results(worker))
    assert own_threads() == []
    assert list(results(worker)) == expected


def test_decoders_that_end_cost_no_memory_that_others_could_use(worker: UnitWorker) -> None:
    worker.decoders = 2
    expected = list(results(worker))
    for _ in range(3):
        of(worker)._processes[0].kill()
        with pytest.raises(TransientError):
            list(results(worker))
    assert list(results(worker)) == expected
    assert len(of(worker)._free) == decoders.PLACES
    assert len(of(worker)._processes) == 2


def test_a_decoder_that_cannot_be_started_again_is_missed_and_not_waited_for(
    worker: UnitWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.decoders = 1
    expected = list(results(worker))
    of(worker)._processes[0].kill()

    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipes.subprocess, "Popen", no_memory)
        for _ in range(2):
            with pytest.raises(OSError, match="Cannot allocate memory"):
                list(results(worker))
    with pytest.raises(TransientError):
        list(results(worker))
    assert list(results(worker)) == expected


def test_a_fault_of_the_program_in_a_decoder_is_seen(worker: UnitWorker) -> None:
    worker.decoders = 1
    worker._preparation = dataclasses.replace(worker._preparation, choices={})
    with pytest.raises(RuntimeError, match=r"(?s)documents from .*KeyError"):
        list(results(worker))


def test_decoders_end_with_their_worker(worker: UnitWorker) -> None:
    worker.decoders = 2
    list(results(worker))
    processes = of(worker)._processes
    assert [process.poll() for process in processes] == [None, None]
    worker.close()
    assert all(process.poll() is not None for process in processes)
    worker.run(units(worker)[0])
    writer = worker._writing._process
    assert writer
    worker.close()
    assert writer.poll() == 0


def test_a_caller_that_stops_leaves_no_thread(worker: UnitWorker) -> None:
    worker.decoders, worker.window = 2, Window(documents=1, size=2**20)
    rows = worker.rows(max(units(worker), key=lambda unit: unit.size))
    assert not isinstance(next(rows), Reject)
    rows.close()  # type: ignore[attr-defined]
    assert own_threads() == []


def test_mapping_is_in_order_and_bounded() -> None:
    given: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            given.append(number)
            yield number

    found = mapped(lambda number: number * number, items(), 3)
    assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(given) <= 5 + 2 * 3 + 1
    assert list(found) == [number * number for number in range(5, 100)]
