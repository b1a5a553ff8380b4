"""Units that one worker does at once, each stage taking up the next one when it is done with the one before."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.errors import TransientError
from pipelines.tokenize.layout import Encoded
from pipelines.tokenize.units import WorkUnit, grouped
from pipelines.tokenize.windows import Chunk, WindowSize
from pipelines.tokenize.worker import UNITS_AT_ONCE, Start, UnitWorker
from tests.pipelines.test_decoders import leftovers, own_threads, units


def test_units_that_several_threads_give_are_done_one_behind_the_other(worker: UnitWorker) -> None:
    def written(unit: WorkUnit) -> tuple[int, int, dict[str, Any], pa.Table]:
        shard = worker.run(unit)
        table = pq.read_table(Path(worker.recipe.dataset) / "shards" / shard.name)
        return shard.rows, shard.rejects, shard.statistics, table

    settings = worker.recipe.units.model_copy(update={"inputs": 2})
    small = [unit for source in worker.recipe.sources for unit in grouped(source.name, source.inputs(), settings)]
    assert len(small) > 8
    # Some have one window and some have many.
    all_units = small + units(worker)
    expected = list(map(written, all_units))
    worker.decoders, worker.window = 2, WindowSize(documents=1, size=2**20)
    with ThreadPoolExecutor(UNITS_AT_ONCE) as threads:
        assert list(threads.map(written, all_units)) == expected
    assert own_threads() == []


def largest(worker: UnitWorker) -> WorkUnit:
    """All of the source with the most inputs."""
    whole = worker.recipe.units.model_copy(update={"inputs": 1000, "bytes": 2**30})
    source = max(worker.recipe.sources, key=lambda source: len(list(source.inputs())))
    (unit,) = grouped(source.name, source.inputs(), whole)
    return unit


@pytest.mark.parametrize("stage", ["_stage", "start"])
@pytest.mark.parametrize("window", [0, 2])
def test_a_unit_that_fails_in_any_stage_holds_up_no_other_one(worker: UnitWorker, stage: str, window: int) -> None:
    unit = largest(worker)
    expected = worker.run(unit).rows
    assert expected >= 8
    worker.decoders, worker.window = 2, WindowSize(documents=1, size=2**20)
    worker.run(unit)
    stages, count = worker._stage, itertools.count()

    def failing(chunks: list[Chunk]) -> Start:
        def start() -> Any:
            raise TransientError("the GPU fell off")

        if next(count) != window:
            return stages(chunks)
        return start() if stage == "_stage" else start  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(UNITS_AT_ONCE) as threads:
        patch.setattr(worker, "_stage", failing)
        futures = [threads.submit(worker.run, unit) for _ in range(4)]
        # The errors are kept, and with them the frames that they came through.
        ends = [future.exception(timeout=60) for future in futures]
        assert sorted(type(end).__name__ for end in ends) == ["NoneType"] * 3 + ["TransientError"]
        assert own_threads() == []
    assert worker.run(unit).rows == expected


@pytest.mark.parametrize("then", ["goes on", "is given up"])
def test_what_the_writer_cannot_take_of_a_unit_holds_up_no_other_one(worker: UnitWorker, then: str) -> None:
    worker.decoders, worker.window = 1, WindowSize(documents=1, size=2**20)
    unit = largest(worker)
    expected = worker.run(unit).rows
    process = worker._writing._process
    assert process
    count = itertools.count()

    def spoilt(unit: WorkUnit) -> Generator[Encoded, None, None]:
        spoil = next(count) == 1
        for number, window in enumerate(UnitWorker._windows(worker, unit)):
            yield ([b"no pickle"], {}) if spoil and number == 2 else window
            if spoil and number == 3 and then == "is given up":
                raise TransientError("the GPU fell off")

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(UNITS_AT_ONCE) as threads:
        patch.setattr(worker, "_windows", spoilt)
        futures = [threads.submit(worker.run, unit) for _ in range(5)]
        ends = [future.exception(timeout=60) for future in futures]
    told = "UnpicklingError" if then == "goes on" else "TransientError"
    assert sorted(type(end).__name__ for end in ends) == ["NoneType"] * 4 + [told]
    assert [future.result().rows for future, end in zip(futures, ends, strict=True) if not end] == [expected] * 4
    assert worker._writing._process is process
    assert leftovers(worker) == []
    assert own_threads() == []


def test_a_killed_writer_fails_what_it_had_and_no_unit_that_comes_after(worker: UnitWorker) -> None:
    worker.decoders, worker.window = 1, WindowSize(documents=1, size=2**20)
    unit = largest(worker)
    expected = worker.run(unit).rows
    count = itertools.count()

    def killing(unit: WorkUnit) -> Generator[Encoded, None, None]:
        kills = next(count) == 2
        for number, window in enumerate(UnitWorker._windows(worker, unit)):
            yield window
            if kills and number == 1:
                assert worker._writing._process
                worker._writing._process.kill()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(UNITS_AT_ONCE) as threads:
        patch.setattr(worker, "_windows", killing)
        futures = [threads.submit(worker.run, unit) for _ in range(8)]
        ends = [future.exception(timeout=60) for future in futures]
    # The one that was being given, and perhaps the one before, which was being finished.
    failed = [end for end in ends if end]
    assert 1 <= len(failed) <= 2
    assert {type(end) for end in failed} == {TransientError}
    assert [future.result().rows for future, end in zip(futures, ends, strict=True) if not end] == [expected] * (
        8 - len(failed)
    )
    assert own_threads() == []
