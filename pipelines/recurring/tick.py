"""One reconcile of a pipeline: `braid pipeline tick NAME`.

Enters: a recipe. Leaves: a record of a run, or word why there was nothing to do. Always holds: it may be called at any
rate, from several hosts at once, and be killed anywhere; what is done is decided by what is not done yet.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from pipelines.crash import crash_point
from pipelines.pretrain.stages import steps_done
from pipelines.recurring.alerts import send_alerts
from pipelines.recurring.due import (
    Due,
    Found,
    added,
    look_at_evaluate,
    look_at_export,
    look_at_inputs,
    look_at_pretrain,
)
from pipelines.recurring.executor import Executor, executor_named, executor_of
from pipelines.recurring.lease import HeldError, Lease
from pipelines.recurring.memory import Memory
from pipelines.recurring.recipe import Event, PipelineRecipe, pretrain_recipe, tokenize_recipe
from pipelines.recurring.state import ENDED_WELL, Outcome, Plan, Record, Result, State, now, seconds_since
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe


class StoppedError(BaseException):
    """A signal asked this process to end."""


@dataclass(frozen=True, kw_only=True)
class Ticked:
    """What a tick did."""

    said: str
    record: Record | None = None
    """Of the run that it did."""
    held: bool = False
    """Whether another process held the lease."""


def tick(name: str, recipe: PipelineRecipe, trigger: str = "tick", executor: Executor | None = None) -> Ticked:
    """Do what is due.

    Args:
        name: of the pipeline, for people.
        trigger: `tick` does nothing while it is paused and leaves alone what was given up; `run` does both; `backfill` does
            not wait for conditions either.

    Raises:
        RecipeError: a recipe that is needed has faults.
        LostError: another process has taken the lease.
    """
    state = State(recipe.state)
    if trigger == "tick" and (paused := state.paused):
        reason = f": {paused['why']}" if paused["why"] else ""
        return _said(state, Ticked(said=f"paused by {paused['by']} at {paused['at']}{reason}"))
    tokenize = tokenize_recipe(recipe)
    try:
        lease = Lease.take(state.lease, recipe.lease, f"{trigger} of {name}")
    except HeldError as error:
        return _said(state, Ticked(said=f"nothing done: {error}", held=True))
    with lease, _stop_by_signal():
        ticked = _Reconcile(name, recipe, tokenize, state, lease, executor or executor_of(recipe)).tick(trigger)
    return _said(state, ticked)


class _Reconcile:
    """One tick that holds the lease."""

    def __init__(
        self,
        name: str,
        recipe: PipelineRecipe,
        tokenize: TokenizeRecipe,
        state: State,
        lease: Lease,
        executor: Executor,
    ) -> None:
        self.name, self.recipe, self.tokenize = name, recipe, tokenize
        self.state, self.lease, self.executor = state, lease, executor

    def tick(self, trigger: str) -> Ticked:
        if going_on := self._conclude_what_ended():
            return Ticked(said=going_on)
        # Told now: a process that sleeps from here on, and is taken for dead, finds the number taken.
        number = (self.state.numbers() or [0])[-1] + 1
        memory = self._memory()
        if trigger != "tick":
            # Whoever calls by hand has mended something, or wants to know.
            memory = Memory(trouble=memory.trouble, inputs=memory.inputs)
        all_of_it = trigger == "backfill"
        aside = memory.set_aside(self.recipe.retries)
        found = look_at_inputs(self.recipe, self.tokenize, aside, all_of_it=all_of_it)
        steps, why = self._chain(found, memory, all_of_it=all_of_it)
        if not steps:
            return Ticked(said="nothing to do: " + "; ".join(f"{step}: {reason}" for step, reason in why.items()))
        plan = self._plan(number, trigger, steps, why, found)
        self.lease.require()
        if not self.state.begin(plan):
            # Only a process that no longer holds the lease, but does not know it yet, can have done that.
            self.lease.require()
            return Ticked(said=f"run {plan.number} was begun by another process; the next tick looks again")
        crash_point("plan_written")
        try:
            over = self.executor.start(self.state, plan, self.recipe.retries, self.lease)
        except StoppedError as stopped:
            record = self._conclude(plan, memory, str(stopped))
            return Ticked(said=describe(record), record=record)
        if not over:
            return Ticked(said=f"run {plan.number}: {self.executor.under_way(self.state, plan)}")
        record = self._conclude(plan, memory)
        return Ticked(said=describe(record), record=record)

    def _conclude_what_ended(self) -> str:
        """Record runs that were begun and have ended; what is still going on, in words."""
        numbers = self.state.numbers()
        unrecorded = []
        for number in reversed(numbers):
            if self.state.record(number):
                break
            unrecorded.append(number)
        for number in reversed(unrecorded):
            plan = self.state.plan(number)
            same = plan.executor == self.executor.name
            executor = self.executor if same else executor_named(plan.executor, self.recipe)
            if going_on := executor.under_way(self.state, plan):
                return f"run {number} is under way: {going_on}"
            self._conclude(plan, self._memory())
        return ""

    def _memory(self) -> Memory:
        newest = next(self.state.records(), None)
        return Memory.of(newest.memory if newest else None)

    def _chain(self, found: Found, memory: Memory, *, all_of_it: bool) -> tuple[list[str], dict[str, str]]:
        """The steps to do, none if none is due, and what was found of each."""
        steps: list[str] = []
        why: dict[str, str] = {}
        for step in self.recipe.steps:
            if step == "clean":
                continue
            due = self._look(step, found, all_of_it=all_of_it)
            if given_up := memory.given_up(step, self.recipe.retries, found.inputs):
                advice = "mend it and call `braid pipeline run`, or wait for new inputs"
                why[step] = f"{given_up}; {advice}" if due.due else due.why
            elif steps:
                steps.append(step)
                why[step] = due.why if due.due else f"after {steps[0]}, if it is due then"
            else:
                why[step] = due.why
                if due.due:
                    steps.append(step)
        return [*steps, "clean"] if steps else [], why

    def _look(self, step: str, found: Found, *, all_of_it: bool) -> Due:
        if step == "tokenize":
            return found.tokenize
        if step == "pretrain":
            return look_at_pretrain(self.recipe, self.tokenize, all_of_it=all_of_it)
        return look_at_evaluate(self.recipe) if step == "evaluate" else look_at_export(self.recipe)

    def _plan(self, number: int, trigger: str, steps: list[str], why: dict[str, str], found: Found) -> Plan:
        pretrain = pretrain_recipe(self.recipe, self.tokenize.dataset) if "pretrain" in steps else None
        before = next(self.state.records(), None)
        return Plan(
            number=number,
            pipeline=self.name,
            trigger=trigger,
            steps=steps,
            why=why,
            inputs=found.inputs,
            without=found.set_aside,
            version=before.version if before else self._version(),
            trained_to=before.trained_to if before else self._trained_to(),
            recipe=self.recipe.model_dump(mode="json", exclude={"alerts"}),
            tokenize=self.tokenize.model_dump(mode="json"),
            pretrain=pretrain.model_dump(mode="json") if pretrain else None,
            folder=str(Path.cwd()),
            executor=self.executor.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            generation=self.lease.generation,
            begun=now(),
        )

    def _version(self) -> int:
        return Dataset.open(self.tokenize.dataset).version if Dataset.exists(self.tokenize.dataset) else 0

    def _trained_to(self) -> int:
        return steps_done(Path(self.recipe.pretrain.output)) if self.recipe.pretrain else 0

    def _conclude(self, plan: Plan, memory: Memory, stopped: str = "") -> Record:
        """Record the end of a run, and tell whom it concerns."""
        results = self.state.results(plan.number, plan.steps)
        outcome, why = _outcome(plan, results, stopped)
        after = memory.after(plan.steps, plan.inputs, results, outcome == "lost")
        version, documents, tokens = self._came(plan)
        record = Record(
            number=plan.number,
            pipeline=plan.pipeline,
            trigger=plan.trigger,
            outcome=outcome,
            why=why,
            steps=results,
            planned=plan.steps,
            due=plan.why,
            version=version,
            documents=documents,
            tokens=tokens,
            trained_to=(trained_to := self._trained_to()),
            steps_trained=trained_to - plan.trained_to,
            executor=plan.executor,
            host=plan.host,
            begun=plan.begun,
            ended=now(),
            seconds=round(seconds_since(plan.begun), 1),
            memory=asdict(after),
        )
        self.lease.require()
        events = _events(record, memory, after, self.recipe)
        record = replace(
            record,
            alerts=send_alerts(self.recipe.alerts, self.name, events, describe(record), asdict(record)),
        )
        crash_point("before_record")
        self.state.conclude(record)
        crash_point("after_record")
        return record

    def _came(self, plan: Plan) -> tuple[int, int, int]:
        """Version of the dataset, and documents and tokens that came to it since a run was begun."""
        if not Dataset.exists(self.tokenize.dataset):
            return 0, 0, 0
        dataset = Dataset.open(self.tokenize.dataset)
        return dataset.version, *added(dataset, plan.version, tokens=True)


def describe(record: Record) -> str:
    """A run in one line."""
    said = {"done": "done", "skipped": "nothing was due", "refused": "refused", "failed": "failed", "lost": "lost"}
    came = f"; {record.documents:,} new documents of {record.tokens:,} tokens" if record.documents else ""
    trained = f"; {record.steps_trained:,} steps trained" if record.steps_trained else ""
    return f"run {record.number} {said[record.outcome]}: {record.why}{came}{trained}"


def _outcome(plan: Plan, results: list[Result], stopped: str) -> tuple[Outcome, str]:
    last = {r.step: r for r in results}
    for step in plan.steps:
        if step not in last:
            return "lost", f"{stopped or 'it ended without a word'}, in or before {step}"
        if last[step].outcome not in ENDED_WELL:
            if stopped:
                return "lost", f"{stopped}, in {step}"
            return last[step].outcome, f"{step}: {last[step].why}"
    done = [f"{step}: {r.why}" for step, r in last.items() if r.outcome == "done" and step != "clean"]
    return ("done", "; ".join(done)) if done else ("skipped", "; ".join(f"{s}: {r.why}" for s, r in last.items()))


def _events(record: Record, before: Memory, after: Memory, recipe: PipelineRecipe) -> list[Event]:
    """What has happened, what matters most first."""
    events: list[Event] = []
    retries = recipe.retries
    steps = [s for s in record.planned if after.given_up(s, retries, after.inputs)]
    if steps or set(after.set_aside(retries)) - set(before.set_aside(retries)):
        events.append("given_up")
    if record.outcome in ("failed", "refused", "lost"):
        events.append(record.outcome)  # type: ignore[arg-type]
    elif before.trouble:
        events.append("recovered")
    if record.outcome == "done":
        events.append("done")
    return events


def _said(state: State, ticked: Ticked) -> Ticked:
    state.ticked(ticked.said)
    return ticked


@contextmanager
def _stop_by_signal() -> Iterator[None]:
    """Let the signals that ask a process to end raise, so that a run's end is recorded and the lease given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
