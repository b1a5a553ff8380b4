"""One unit of work without Ray, nor anything else that a GPU machine may lack."""

from __future__ import annotations

import time

from pipelines.corpus.documents import Slice
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker


def whole_unit(worker: UnitWorker) -> WorkUnit:
    """All inputs of the recipe's only source as one unit."""
    (source,) = worker.recipe.sources
    return WorkUnit(
        source=source.name, slices=tuple(Slice(input=item, start=0, stop=item.size) for item in source.inputs())
    )


def one_unit(worker: UnitWorker) -> tuple[float, str]:
    """Seconds of that unit, and its shard's name."""
    unit = whole_unit(worker)
    began = time.perf_counter()
    written = worker.run(unit)
    return time.perf_counter() - began, written.name
