"""Units of work without Ray, nor anything else that a GPU machine may lack."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from pipelines.corpus.documents import Slice
from pipelines.tokenize.recipe import UnitSettings
from pipelines.tokenize.units import WorkUnit, grouped
from pipelines.tokenize.worker import UNITS_AT_ONCE, UnitWorker


def whole_unit(worker: UnitWorker) -> WorkUnit:
    """All inputs of the recipe's only source as one unit."""
    (source,) = worker.recipe.sources
    return WorkUnit(
        source=source.name, slices=tuple(Slice(input=item, start=0, stop=item.size) for item in source.inputs())
    )


def one_unit(worker: UnitWorker) -> tuple[float, list[str]]:
    """Seconds of that unit, and its shard's name."""
    unit = whole_unit(worker)
    began = time.perf_counter()
    written = worker.run(unit)
    return time.perf_counter() - began, [written.name]


def units_at_once(worker: UnitWorker, *, size: int) -> tuple[float, list[str]]:
    """Seconds of all inputs in units of so many bytes, handed to the worker as a job does, and their shards' names."""
    (source,) = worker.recipe.sources
    units = grouped(source.name, source.inputs(), UnitSettings(bytes=size))
    began = time.perf_counter()
    with ThreadPoolExecutor(UNITS_AT_ONCE) as threads:
        names = [written.name for written in threads.map(worker.run, units)]
    return time.perf_counter() - began, names
