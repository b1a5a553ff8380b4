"""What would keep a pipeline from running, found before it is missed.

Enters: a recipe. Leaves: findings, each with its remedy. Always holds: nothing is changed, but for probe files in the
state folder that are removed again.
"""

from __future__ import annotations

import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pipelines.exclusive import create_exclusively
from pipelines.recipe import RecipeError, read_recipe
from pipelines.recurring.entries import Installed, InstallError, keeper
from pipelines.recurring.lease import heartbeat_age_s, read_holder, whoami
from pipelines.recurring.memory import Memory
from pipelines.recurring.recipe import PipelineRecipe, pretrain_recipe, tokenize_recipe
from pipelines.recurring.schedule import Schedule
from pipelines.recurring.state import State

SLACK = timedelta(minutes=5)
"""A tick may be so late before it counts as missed: cron has a grain of a minute, and a queue may be busy."""

_LEAST_FREE = 2**30
"""Bytes that the disk of the state folder should have."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "fault"]
    text: str


def examine(name: str, recipe: PipelineRecipe) -> Iterator[Finding]:
    """Look at everything that a tick needs."""
    state = State(recipe.state)
    yield from _recipes(recipe)
    yield from _folder(state)
    yield from _entry(name, state)
    yield from _lease(state, recipe)
    yield from _alerts(recipe)
    yield from _cluster(state, recipe)
    if paused := state.paused:
        yield Finding("note", f"paused by {paused['by']} at {paused['at']}; `braid pipeline resume {name}` ends that")
    if newest := next(state.records(), None):
        memory = Memory.of(newest.memory)
        if newest.outcome in ("failed", "refused", "lost"):
            yield Finding("note", f"the last run, {newest.number}, was {newest.outcome}: {newest.why}")
        for step in newest.planned:
            if why := memory.given_up(step, recipe.retries, memory.inputs):
                yield Finding("fault", f"{step} is {why}; mend it and call `braid pipeline run {name}`")
        if aside := memory.set_aside(recipe.retries):
            yield Finding(
                "fault",
                f"{len(aside)} units of inputs are set aside after failures: {', '.join(aside[:3])}; the logs in "
                f"{state.runs} say why; then `braid pipeline run {name}` tries them again",
            )


def _recipes(recipe: PipelineRecipe) -> Iterator[Finding]:
    try:
        tokenize = tokenize_recipe(recipe)
        pretrain_recipe(recipe, tokenize.dataset)
    except ValueError as error:
        yield Finding("fault", f"the recipes cannot be used: {error}")
        return
    yield Finding("ok", "the recipes can be read")
    for source in tokenize.sources:
        try:
            next(iter(source.inputs()), None)
        except ValueError as error:
            yield Finding("fault", str(error))
        else:
            yield Finding("ok", f"source {source.name} can be listed")


def _folder(state: State) -> Iterator[Finding]:
    probe = state.folder / f".probe.{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
    try:
        first, second = create_exclusively(probe, b"1"), create_exclusively(probe, b"2")
        skew = abs(probe.stat().st_mtime - datetime.now().timestamp())
    except OSError as error:
        yield Finding(
            "fault", f"{state.folder}: {error.strerror}; it must be writable, on a file system with hard links"
        )
        return
    finally:
        probe.unlink(missing_ok=True)
    if (first, second) == (True, False):
        yield Finding("ok", f"{state.folder} creates files exclusively")
    else:
        yield Finding(
            "fault", f"{state.folder}: two processes can create the same file; put `state` on NFS or a local disk"
        )
    if skew > SLACK.total_seconds():
        yield Finding(
            "note", f"the clocks of this machine and of the file server differ by {skew:.0f} s; histories look odd"
        )
    if (free := shutil.disk_usage(state.folder).free) < _LEAST_FREE:
        yield Finding("fault", f"{state.folder}: only {free / 1e6:,.0f} MB are free on its disk")


def _entry(name: str, state: State) -> Iterator[Finding]:
    installed = Installed.of(state)
    again = f"`braid pipeline install {name} --via {installed.via if installed else 'cron'} --at '...'`"
    if installed is None:
        yield Finding("note", f"not installed: nobody calls it; {again} does that")
        return
    here = socket.gethostname(), whoami()
    if installed.via != "scrontab" and here != (installed.host, installed.user):
        yield Finding("note", f"installed on {installed.host} by {installed.user}; look at its entry there")
    else:
        yield from _entry_here(installed, state, again)
    for what, path in (("recipe", installed.recipe), ("folder", installed.folder), ("Python", installed.python)):
        if not Path(path).exists():
            yield Finding("fault", f"the {what} that it was installed with, {path}, is gone; install it again: {again}")
    yield from _last_tick(installed, state)


def _entry_here(installed: Installed, state: State, again: str) -> Iterator[Finding]:
    try:
        kept = keeper(installed.via)
        entry = next((e for e in kept.entries() if e.name == installed.name), None)
    except InstallError as error:
        yield Finding("fault", str(error))
        return
    if entry is None:
        yield Finding("fault", f"its entry is no longer in {installed.via}; install it again: {again}")
    elif not entry.enabled:
        cause = "a cancelled job of scrontab is written back so" if installed.via == "scrontab" else "somebody did that"
        yield Finding("fault", f"its entry in {installed.via} is disabled ({cause}); install it again: {again}")
    elif (entry.at, entry.script) != (installed.at, str(state.folder / "tick.sh")):
        yield Finding("note", f"its entry in {installed.via} was changed by hand: {entry.at} {entry.script}")
    elif not (state.folder / "tick.sh").exists():
        yield Finding("fault", f"{state.folder / 'tick.sh'} is gone; install it again: {again}")
    else:
        yield Finding("ok", f"its entry in {installed.via} stands: {entry.at}")
    if why := kept.asleep():
        yield Finding("fault", why)


def _last_tick(installed: Installed, state: State) -> Iterator[Finding]:
    schedule, last = Schedule(installed.at), state.last_tick
    since = max(last["at"] if last else "", installed.installed)
    expected = schedule.next_after(datetime.fromisoformat(since).astimezone().replace(tzinfo=None))
    told = f"the last tick was at {last['at']} on {last['host']}: {last['said']}" if last else "nobody has ticked yet"
    if expected + SLACK < datetime.now() and read_holder(state.lease) is None:
        yield Finding(
            "fault", f"a tick was due at {expected} and did not come; {told}; look at {state.folder / 'tick.log'}"
        )
    else:
        yield Finding("ok", f"{told}; the next is due at {schedule.next_after(datetime.now())}")


def _lease(state: State, recipe: PipelineRecipe) -> Iterator[Finding]:
    if (holder := read_holder(state.lease)) is None:
        yield Finding("ok", "the lease is free")
    elif holder.is_gone or heartbeat_age_s(state.lease) > recipe.lease.ttl_s:
        yield Finding("note", f"{holder}, died with the lease; the next tick takes it over and records the lost run")
    else:
        yield Finding("note", f"{holder}, is at work")


def _alerts(recipe: PipelineRecipe) -> Iterator[Finding]:
    for alert in recipe.alerts:
        if alert.command and not shutil.which(alert.command[0]):
            yield Finding("fault", f"alerts: {alert.command[0]}: no such program; name it by its whole path")
    if not recipe.alerts:
        yield Finding("note", "no alerts: nobody is told of a failure; see `alerts` in docs/recurring.md")


def _cluster(state: State, recipe: PipelineRecipe) -> Iterator[Finding]:
    if not recipe.slurm:
        return
    # Here, because most pipelines need nothing of SLURM.
    from slurm.checks import SubmissionError, check
    from slurm.commands import SlurmError
    from slurm.settings import ClusterRecipe

    for step in recipe.steps:
        place = recipe.slurm.place(step)
        try:
            check(read_recipe(ClusterRecipe, place.cluster, place.overrides), state.folder)
        except (SubmissionError, SlurmError, RecipeError) as error:
            yield Finding("fault", f"{step} on SLURM: {error}")
        else:
            yield Finding("ok", f"{step} can be submitted")
