"""A unit that is read, decoded, encoded and written at once, as on a GPU: the same rows, and nothing is left running."""

import dataclasses
import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.documents import Document, Dropped, Reject, Slice
from pipelines.corpus.errors import TransientError
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.sequence import Modality
from pipelines.shards.schema import Row
from pipelines.tokenize import pipes, reading
from pipelines.tokenize.decoders import TAKEN
from pipelines.tokenize.layout import Encoded
from pipelines.tokenize.prepare import Part, Prepared
from pipelines.tokenize.units import WorkUnit, grouped
from pipelines.tokenize.windows import Chunk, WindowSize, windows_of
from pipelines.tokenize.worker import UnitWorker


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
    """Those of workers; loaders of other tests may have left theirs."""
    return [
        thread.name for thread in threading.enumerate() if thread.name in ("braid-read", "braid-stage", "braid-encode")
    ]


def reader_of(worker: UnitWorker) -> int:
    assert worker._reading._beside
    return worker._reading._beside.process.pid


def decoders_of(worker: UnitWorker) -> list[int]:
    reader = reader_of(worker)
    return [int(pid) for pid in Path(f"/proc/{reader}/task/{reader}/children").read_text().split()]


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "window",
    [
        WindowSize(documents=256, size=2**28),
        WindowSize(documents=3, size=2000),
        WindowSize(documents=40, size=2**28, first=1),
    ],
)
def test_decoders_change_no_row_and_no_order(worker: UnitWorker, window: WindowSize) -> None:
    expected = list(results(worker))
    worker.decoders, worker.window = 3, window
    assert list(results(worker)) == expected
    assert len(expected) == 42
    assert own_threads() == []


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

    def killing(unit: WorkUnit) -> Generator[Encoded, None, None]:
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
    worker.decoders, worker.window = 1, WindowSize(documents=1, size=2**20)
    unit = max(units(worker), key=lambda unit: unit.size)
    worker.run(unit)

    def failing(unit: WorkUnit) -> Generator[Encoded, None, None]:
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
    def document(number: int) -> Chunk:
        return Chunk.of([Prepared("", f"d{number}", 0, "", [Part(Modality.AUDIO, np.zeros(25, np.float32), "")], None)])

    def lengths(window: WindowSize) -> list[int]:
        return [len(found) for found in windows_of(map(document, range(40)), window)]

    assert lengths(WindowSize(documents=16, size=2**20)) == [16, 16, 8]
    assert lengths(WindowSize(documents=16, size=2**20, first=3)) == [3, 6, 12, 16, 3]
    assert lengths(WindowSize(documents=16, size=700, first=3)) == [3, 6, 7, 7, 7, 7, 3]
    assert lengths(WindowSize(documents=16, size=50)) == [1] * 40
    patient = windows_of(map(document, range(40)), WindowSize(documents=16, size=2**20, first=3), lambda: False)
    assert list(map(len, patient)) == [16, 16, 8]


def test_a_window_that_is_begun_holds_no_media(worker: UnitWorker) -> None:
    media: list[weakref.ref[np.ndarray]] = []

    def window(unit: WorkUnit) -> list[Chunk]:
        chunks = list(worker._chunks(unit))
        media.extend(weakref.ref(array) for chunk in chunks for array in (*chunk.pictures, *chunk.sounds))
        return chunks

    for _, start in worker._staged(window(unit) for unit in units(worker)):
        codes = start()
        assert [ref() for ref in media if ref() is not None] == []
        assert codes()
    assert media


def test_arrays_that_do_not_fit_or_find_no_place_come_through_pipes_and_places_become_free(
    worker: UnitWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(results(worker))
    said: list[int] = []
    say = reading._Beside._say

    def heard(self: reading._Beside, what: int) -> None:
        said.append(what)
        say(self, what)

    monkeypatch.setattr(reading._Beside, "_say", heard)
    for places, size in ((2, 2**12), (2, 2**20), (64, 2**20)):
        monkeypatch.setattr(reading, "PLACES", places)
        monkeypatch.setattr(reading, "PLACE_BYTES", size)
        worker.decoders = 2
        for _ in range(2):
            said.clear()
            assert list(results(worker)) == expected
            gc.collect()
            chunks = said.count(TAKEN)
            free = [number for number in said if number != TAKEN]
            assert chunks > places or len(free) == chunks
            assert set(free) <= set(range(places))
        worker.close()


def test_a_killed_decoder_or_reader_fails_its_unit_and_the_next_try_goes_well(worker: UnitWorker) -> None:
    expected = list(results(worker))
    worker.decoders = 1
    assert list(results(worker)) == expected
    for find, message in (
        (lambda: decoders_of(worker)[0], r"a decoder ended with exit code -9, at one of the .*cpus_per_worker"),
        (lambda: reader_of(worker), r"the process that reads ended with exit code -9, at unit .*cpus_per_worker"),
    ):
        reader = reader_of(worker)
        os.kill(find(), signal.SIGKILL)
        with pytest.raises(TransientError, match=message):
            list(results(worker))
        assert own_threads() == []
        assert ended(reader)
        assert list(results(worker)) == expected


def test_a_unit_that_is_given_up_takes_its_processes_along_and_the_next_one_goes_well(worker: UnitWorker) -> None:
    expected = list(results(worker))
    worker.decoders, worker.window = 2, WindowSize(documents=1, size=2**20)
    unit = max(units(worker), key=lambda unit: unit.size)
    chunks = worker._chunks(unit)
    next(chunks)
    pids = [reader_of(worker), *decoders_of(worker)]
    chunks.close()  # type: ignore[attr-defined]
    assert len(pids) == 3
    assert all(map(ended, pids))
    assert list(results(worker)) == expected


def test_a_reader_that_cannot_be_started_is_missed_and_not_waited_for(
    worker: UnitWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.decoders = 1

    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pipes.subprocess, "Popen", no_memory)
        for _ in range(2):
            with pytest.raises(OSError, match="Cannot allocate memory"):
                list(results(worker))
    assert len(list(results(worker))) == 42


def test_a_fault_of_the_program_in_a_decoder_is_seen(worker: UnitWorker) -> None:
    worker.decoders = 1
    worker._reading.preparation = dataclasses.replace(worker._reading.preparation, choices={})
    with pytest.raises(RuntimeError, match=r"(?s)documents from .*KeyError"):
        list(results(worker))


class RaisingSource(MediaFolderSource):
    """Gives one document, and then what `raises` names."""

    raises: str = "EOFError"

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject | Dropped]:
        yield next(super().read(slices))
        kinds = {error.__name__: error for error in (EOFError, BrokenPipeError, KeyError, TransientError)}
        raise kinds[self.raises]("the corpus says so")


@pytest.mark.parametrize("name", ["EOFError", "BrokenPipeError", "KeyError", "TransientError"])
def test_what_reading_raises_is_raised_and_says_where(worker: UnitWorker, name: str) -> None:
    worker.decoders = 1
    expected = list(results(worker))
    whole = worker._reading.sources
    (media,) = [source for source in whole.values() if isinstance(source, MediaFolderSource)]
    raising = RaisingSource.model_validate(media.model_dump() | {"raises": name})
    worker.close()
    worker._reading.sources = whole | {media.name: raising}
    unit = next(unit for unit in units(worker) if unit.source == media.name)
    with pytest.raises(Exception, match="the corpus says so") as error:
        list(worker.rows(unit))
    assert error.typename == name
    assert "in read\n" in "".join(error.value.__notes__)
    worker._reading.sources = whole
    assert list(results(worker)) == expected


def test_a_reader_that_cannot_begin_says_why(worker: UnitWorker) -> None:
    worker.decoders = 1
    worker._reading.preparation = Unreadable()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not to be read"):
        list(results(worker))


class Unreadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not to be read",)


def test_processes_end_with_their_worker(worker: UnitWorker) -> None:
    worker.decoders = 2
    worker.run(units(worker)[0])
    pids = [reader_of(worker), *decoders_of(worker)]
    assert not any(map(ended, pids))
    writer = worker._writing._process
    assert writer
    worker.close()
    assert all(map(ended, pids))
    assert writer.poll() == 0


def test_processes_end_with_a_worker_that_is_killed_in_the_middle_of_a_unit(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from tests.pipelines.test_decoders import decoders_of, reader_of, units
        from tests.pipelines.tiny import tiny_recipe
        from pipelines.tokenize.worker import UnitWorker

        worker = UnitWorker(tiny_recipe(Path(sys.argv[1])))
        worker.decoders = 2
        unit = max(units(worker), key=lambda unit: unit.size)
        worker.run(unit)
        rows = worker.rows(unit)
        next(rows)
        print(reader_of(worker), *decoders_of(worker), worker._writing._process.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 4
        assert not any(map(ended, pids))
        process.kill()
    deadline = time.monotonic() + 20
    while not all(map(ended, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_caller_that_stops_leaves_no_thread(worker: UnitWorker) -> None:
    worker.decoders, worker.window = 2, WindowSize(documents=1, size=2**20)
    rows = worker.rows(max(units(worker), key=lambda unit: unit.size))
    assert not isinstance(next(rows), Reject)
    rows.close()  # type: ignore[attr-defined]
    assert own_threads() == []
