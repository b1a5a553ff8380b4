"""The workers of a tokenize job: Ray actors, one `UnitWorker` each, on this machine or on a cluster.

Enters: work units. Leaves: their shards, as they are finished. Always holds: a unit whose worker died, or whose storage
did not answer, is tried again a bounded number of times; nodes that join later are used, and workers without work are
given back, so that an autoscaling cluster follows the job. Where workers have GPUs, units without media are left to workers
without.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayError, RayTaskError

from pipelines.corpus.errors import StoreError, TransientError
from pipelines.shards.storage import DiskFullError
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.budget import JobError
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UNITS_AT_ONCE, UnitWorker

IN_FLIGHT = 2
"""Units handed to each worker without a GPU: the next one waits there while one runs."""

RETRY_AFTER_S = 1.0
"""Wait before a unit that failed is tried again; twice as long each further time."""

_FAREWELL_S = 10.0
"""For units that are under way when the job fails."""

_RESTART_POLL_S = 0.1
"""Wait before a worker that is being restarted is asked again."""

GPU = "cuda"
"""What workers with a GPU encode on."""

MOST_AWAY, MOST_DIED = 3, 10
"""When so many units in a row have failed because a store was away, or because their workers died, it is not the units."""


class UnitsFailedError(JobError):
    """Some units failed as often as the recipe allows; the message says which, and why."""

    def __init__(self, message: str, units: Iterable[str]) -> None:
        """Args:
        units: those that are to blame themselves, all others being done.
        """
        super().__init__(message)
        self.units = sorted(units)


@dataclass(eq=False)
class _Actor:
    handle: Any
    on_gpu: bool
    ready: bool = False
    running: list[Any] = field(default_factory=list)
    """Results to come, in the order in which the worker was given their units."""


Waiting = dict[bool, deque[WorkUnit]]
"""Units that no worker has yet: those for workers with a GPU, and those for workers without."""


class Pool:
    """Workers for one job; a context manager."""

    def __init__(self, recipe: TokenizeRecipe, witness: str, sources: Set[str]) -> None:
        """Args:
        witness: name of a file in the dataset; a worker that does not see it writes to a folder of another machine.
        sources: the names of those that there are units of.
        """
        self._recipe = recipe
        self._witness = witness
        self._sources = [source for source in recipe.sources if source.name in sources]
        self._without_gpu: set[str] = set()
        """The sources whose units are left to workers without a GPU."""
        self._actors: list[_Actor] = []
        self._pending: dict[Any, tuple[_Actor, WorkUnit | None]] = {}
        """What Ray owes: results with their units, and starting workers with None."""
        self._tries: Counter[str] = Counter()
        self._suspects: set[str] = set()
        """Units that were being done beside others when their worker died."""
        self._delayed: list[tuple[float, WorkUnit]] = []
        """Units to be tried again from a time on."""
        self._failed: list[str] = []
        """Of units that are not tried again, why."""
        self._to_blame: set[str] = set()
        """Of these, the units that killed their workers while others did not."""
        self._in_a_row: Counter[str] = Counter()
        """Of these, by kind, those since the last unit that was finished."""
        self.ready_s = 0.0
        """From the start to the first worker that was ready."""

    def __enter__(self) -> Self:
        began = time.monotonic()
        settings = self._recipe.cluster
        # Ray tells on every start that its token authentication is on, as it should be.
        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": False}
        if address := settings.address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **quiet)
        else:
            # More workers than cores is a wish to be granted. "local", because a Ray that crashed leaves an address behind
            # which the default would try to join.
            wished = math.ceil((self._recipe.workers or 1) * (settings.cpus_per_worker or 1))
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, wished), include_dashboard=False, **quiet)
        try:
            nodes, gpus = _nodes(), settings.gpus_per_worker
            cpus = settings.cpus_of_workers(nodes)
            cluster = settings.model_copy(update={"cpus_per_worker": cpus})
            self._recipe = self._recipe.model_copy(update={"cluster": cluster})
            for on_gpu, count in self._counts(nodes, cpus).items():
                options = {"num_cpus": cpus, "num_gpus": gpus} if on_gpu or not gpus else {"num_cpus": 1}
                options |= {"max_concurrency": UNITS_AT_ONCE if on_gpu else 1}
                worker = ray.remote(**options, max_restarts=-1, max_task_retries=0)(UnitWorker)
                for _ in range(count):
                    self._actors.append(_Actor(worker.remote(self._recipe, GPU if on_gpu else "cpu"), on_gpu))
                    self._await_start(self._actors[-1])
            self._wait_for_the_first(settings.start_timeout_s)
        except BaseException:
            ray.shutdown()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._pending:
            # Else a worker is killed while it writes a unit, and what it has written stays. One that takes longer is killed.
            with suppress(RayError):
                ray.wait(list(self._pending), num_returns=len(self._pending), timeout=_FAREWELL_S)
        for actor in self._actors:
            ray.kill(actor.handle)
        ray.shutdown()

    def run(self, units: Iterable[WorkUnit], tick_s: float) -> Iterator[tuple[WorkUnit, WrittenShard] | None]:
        """Do the units, the first ones first; each with its shard as it is finished, None when `tick_s` passed without.

        Raises:
            UnitsFailedError: units failed as often as the recipe allows; at the end, so that none of them holds up others.
            JobError: a store refuses.
        """
        waiting = {True: deque[WorkUnit](), False: deque[WorkUnit]()}
        for unit in units:
            waiting[self._on_gpu(unit)].append(unit)
        while any(waiting.values()) or self._delayed or any(actor.running for actor in self._actors):
            self._hand_out(waiting)
            pending = list(self._pending)
            if not pending:
                time.sleep(min(tick_s, 0.1))
            done, _ = ray.wait(pending, num_returns=1, timeout=tick_s) if pending else ([], [])
            if not done:
                yield None
            for reference in done:
                if reference in self._pending and (finished := self._received(reference, waiting)):
                    self._in_a_row.clear()
                    yield finished
            if self._in_a_row["away"] >= MOST_AWAY or self._in_a_row["died"] >= MOST_DIED:
                self._to_blame.clear()
                break
        if self._failed:
            raise UnitsFailedError("\n".join(self._failed), self._to_blame)

    def _counts(self, nodes: Sequence[tuple[float, float]], cpus: float) -> dict[bool, int]:
        """How many workers to start, with a GPU and without; decides which sources are left to the latter.

        Args:
            nodes: CPUs and GPUs of each.
            cpus: what a worker takes, of those with a GPU where there are such.
        """
        settings, most = self._recipe.cluster, self._recipe.workers
        places = [settings.places(*node, cpus) for node in nodes]
        fit = sum(places)
        if not settings.gpus_per_worker:
            self._without_gpu = {source.name for source in self._sources}
            return {False: most or max(1, fit)}
        texts = {source.name for source in self._sources if not source.has_media}
        others = len(self._sources) > len(texts)
        with_gpu = most or max(1, fit)
        left = 0
        for (has, _), here in zip(nodes, places, strict=True):
            # Where of several nodes Ray puts fewer than fit is not known, so their places stay free on each.
            taken = (min(here, with_gpu) if len(nodes) == 1 else here) if others else 0
            left += int(has - taken * cpus + 1e-9)
        beside = left if settings.cpu_workers is None else settings.cpu_workers
        if not texts or (others and not beside):
            return {True: with_gpu}
        self._without_gpu = texts
        return ({True: with_gpu} if others else {}) | {False: max(beside, 1)}

    def _on_gpu(self, unit: WorkUnit) -> bool:
        return unit.source not in self._without_gpu

    def _received(self, reference: Any, waiting: Waiting) -> tuple[WorkUnit, WrittenShard] | None:
        actor, unit = self._pending[reference]
        try:
            result = ray.get(reference)
        except RayActorError as error:
            if unit is None:
                if not isinstance(error, ActorUnavailableError):
                    raise
                # It died, and is not back yet.
                self._forget(reference)
                time.sleep(_RESTART_POLL_S)
                self._await_start(actor)
                return None
            lost = [unit for _, unit in map(self._pending.pop, actor.running) if unit]
            actor.running, actor.ready = [], False
            # The worker comes back, and its units wait for it or for another.
            self._await_start(actor)
            if actor.on_gpu and len(lost) > 1:
                # Several were being done: each is done alone now, and who is to blame dies again.
                self._suspects.update(unit.id for unit in lost)
                waiting[actor.on_gpu].extendleft(reversed(lost))
                return None
            # Only the first was being done.
            waiting[actor.on_gpu].extendleft(reversed(lost[1:]))
            self._again(lost[0], "died", "its worker died without a Python error (out of memory, or killed)")
            return None
        except ObjectLostError:
            # A large result stays on the node that made it until it is fetched.
            self._forget(reference)
            if unit is None:
                self._await_start(actor)
            else:
                self._again(unit, "died", "the node that held its result was lost")
            return None
        except RayTaskError as error:
            if isinstance(error.cause, DiskFullError | StoreError):
                raise JobError(str(error.cause)) from error
            if unit is None or not isinstance(error.cause, TransientError):
                raise
            self._forget(reference)
            self._again(unit, "away", str(error.cause))
            return None
        self._forget(reference)
        if unit is None:
            actor.ready = True
            return None
        return unit, result

    def _await_start(self, actor: _Actor) -> None:
        self._pending[actor.handle.ready.remote(self._witness)] = actor, None

    def _forget(self, reference: Any) -> None:
        actor, unit = self._pending.pop(reference)
        if unit:
            actor.running.remove(reference)

    def _hand_out(self, waiting: Waiting) -> None:
        now = time.monotonic()
        for due, unit in self._delayed:
            if due <= now:
                waiting[self._on_gpu(unit)].append(unit)
        self._delayed = [(due, unit) for due, unit in self._delayed if due > now]
        for depth in range(max(UNITS_AT_ONCE, IN_FLIGHT)):
            for actor in self._actors:
                most = UNITS_AT_ONCE if actor.on_gpu else IN_FLIGHT
                if actor.ready and len(actor.running) == depth < most and (given := self._next(actor, waiting)):
                    reference = actor.handle.run.remote(given)
                    actor.running.append(reference)
                    self._pending[reference] = actor, given
        if not self._delayed:
            self._give_back(waiting)

    def _next(self, actor: _Actor, waiting: Waiting) -> WorkUnit | None:
        """The unit that a worker is to do next, if there is one; taken from those that wait.

        Units that failed, or were lost with their worker, are done alone, so that it is known which of them fails.
        """
        units = waiting[actor.on_gpu]
        if not actor.running:
            return units.popleft() if units else None
        if any(self._suspicious(self._pending[reference][1]) for reference in actor.running):
            return None
        unit = next((unit for unit in units if not self._suspicious(unit)), None)
        if unit:
            units.remove(unit)
        return unit

    def _suspicious(self, unit: WorkUnit | None) -> bool:
        return unit is not None and (unit.id in self._suspects or self._tries[unit.id] > 0)

    def _give_back(self, waiting: Waiting) -> None:
        """Let go of workers for which nothing is left, those that a busy cluster has not started yet too."""
        for actor in [actor for actor in self._actors if not actor.running and not waiting[actor.on_gpu]]:
            ray.kill(actor.handle)
            self._actors.remove(actor)
            self._pending = {r: owed for r, owed in self._pending.items() if owed[0] is not actor}

    def _again(self, unit: WorkUnit, kind: str, why: str) -> None:
        self._tries[unit.id] += 1
        if self._tries[unit.id] >= self._recipe.units.tries:
            first, last = unit.slices[0], unit.slices[-1]
            self._in_a_row[kind] += 1
            if kind == "died":
                self._to_blame.add(unit.id)
            self._failed.append(
                f"unit {unit.id} failed {self._tries[unit.id]} times, last because {why}: {len(unit.slices)} inputs of "
                f"source {unit.source}, from {first.input.uri} to {last.input.uri}. Lower units.bytes or workers, or look "
                "at these inputs; what is done stays committed."
            )
            return
        self._delayed.append((time.monotonic() + RETRY_AFTER_S * 2.0 ** (self._tries[unit.id] - 1), unit))

    def _wait_for_the_first(self, timeout_s: float) -> None:
        """Of either kind."""
        settings = self._recipe.cluster
        for on_gpu in {actor.on_gpu for actor in self._actors}:
            kind = [reference for reference, (actor, _) in self._pending.items() if actor.on_gpu is on_gpu]
            done, _ = ray.wait(kind, num_returns=1, timeout=timeout_s)
            if not done:
                free = ray.available_resources()
                has = ", ".join(f"{free[name]:g} {name}" for name in ("CPU", "GPU") if name in free)
                wants = f"{settings.cpus_per_worker:g} CPU and {settings.gpus_per_worker:g} GPU"
                if settings.gpus_per_worker and not on_gpu:
                    wants = "1 CPU"
                raise JobError(
                    f"no worker could start within cluster.start_timeout_s = {timeout_s:g}: each wants {wants}, and the "
                    f"cluster has {has or 'nothing'} free; lower what a worker wants, or wait for the cluster"
                )
            for reference in done:
                self._received(reference, {})


def _nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of each node, as they are now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]
