"""One unit of work without Ray, nor anything else that a GPU machine may lack."""

from __future__ import annotations

import time

from pipelines.corpus.documents import Slice
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker


def one_unit(worker: UnitWorker) -> tuple[float, str]:
    """Seconds of one unit over all inputs of the recipe's only source, without Ray, and its shard's name."""
    (source,) = worker.recipe.sources
    slices = tuple(Slice(input=item, start=0, stop=item.size) for item in source.inputs())
    began = time.perf_counter()
    written = worker.run(WorkUnit(source=source.name, slices=slices))
    return time.perf_counter() - began, written.name
