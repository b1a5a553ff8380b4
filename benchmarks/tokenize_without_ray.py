"""A whole tokenize job where there is no Ray: `python -m benchmarks.tokenize_without_ray RECIPE WORKERS [a.b=value ...]`.

Enters: a recipe of `braid tokenize`. Leaves: the dataset that it would make. Always holds: planning, the units' work and the
commits are the job's own; only its pool is another one, of processes that share one GPU (or the CPU).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator, Set
from multiprocessing.queues import Queue
from typing import Any, Self


def _without_ray() -> None:
    """Whatever of Ray `pipelines.tokenize.pool` imports; nothing here calls it."""
    ray, exceptions = types.ModuleType("ray"), types.ModuleType("ray.exceptions")

    def error(name: str) -> type[Exception]:
        if not name.endswith("Error"):
            raise AttributeError(name)
        return type(name, (Exception,), {})

    exceptions.__getattr__ = error  # type: ignore[method-assign]
    ray.exceptions = exceptions  # type: ignore[attr-defined]
    sys.modules |= {"ray": ray, "ray.exceptions": exceptions}


def _work(recipe: Any, device: str, units: Queue[Any], done: Queue[Any]) -> None:
    from pipelines.tokenize.worker import UnitWorker

    worker = UnitWorker(recipe, device)
    try:
        while (unit := units.get()) is not None:
            done.put((unit, worker.run(unit)))
    except BaseException as error:
        done.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise
    finally:
        worker.close()


class ProcessPool:
    """What `pipelines.tokenize.pool.Pool` is to the job."""

    workers = 1
    device = "cpu"

    def __init__(self, recipe: Any, witness: str, sources: Set[str]) -> None:
        self._recipe = recipe
        self.ready_s = 0.0

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._units, self._done = context.Queue(), context.Queue()
        self._processes = [
            context.Process(target=_work, args=(self._recipe, self.device, self._units, self._done))
            for _ in range(self.workers)
        ]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill() if any(error) else process.join()

    def run(self, units: Iterable[Any], tick_s: float) -> Iterator[tuple[Any, Any] | None]:
        """The units with their shards, as they are finished."""
        left = list(units)
        for unit in (*left, *[None] * self.workers):
            self._units.put(unit)
        for _ in left:
            while self._done.empty():
                if bad := [p.exitcode for p in self._processes if p.exitcode]:
                    time.sleep(1)
                    if self._done.empty():
                        raise RuntimeError(f"a worker ended with exit code {bad[0]}")
                time.sleep(0.02)
            result = self._done.get()
            if isinstance(result, Exception):
                raise result
            yield result


def main(arguments: list[str]) -> None:
    _without_ray()
    import torch

    from pipelines.recipe import read_recipe
    from pipelines.tokenize import job
    from pipelines.tokenize.recipe import TokenizeRecipe

    path, workers, *overrides = arguments
    ProcessPool.workers = int(workers)
    ProcessPool.device = "cuda" if torch.cuda.is_available() else "cpu"
    if ProcessPool.device == "cuda":
        each = max(1, (os.cpu_count() or 1) // ProcessPool.workers)
        overrides = ["cluster.gpus_per_worker=1", f"cluster.cpus_per_worker={each}", *overrides]
    job.Pool = ProcessPool  # type: ignore[assignment,misc]
    print(job.tokenize(read_recipe(TokenizeRecipe, path, overrides)))


if __name__ == "__main__":
    main(sys.argv[1:])
