"""What a pipeline did and where it stands, for people and programs.

Enters: the state folder. Leaves: rows and figures. Always holds: the records are the truth; everything here is made from
them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.recurring.entries import Installed
from pipelines.recurring.lease import read_holder
from pipelines.recurring.memory import Memory
from pipelines.recurring.recipe import PipelineRecipe
from pipelines.recurring.schedule import Schedule
from pipelines.recurring.state import Record, State
from pipelines.report.charts import short

MODALITIES = ("text", "image", "audio")

_COLOURS = {"done": "green", "skipped": "dim", "refused": "yellow", "failed": "red", "lost": "magenta"}


def losses(record: Record) -> dict[str, float]:
    """Validation losses by modality of the stage that a run finished."""
    return {name: value for name, value in (record.did("loss") or {}).items() if name in MODALITIES}


def row(record: Record) -> dict[str, Any]:
    """A run as a flat mapping, for JSON."""
    return {
        "run": record.number,
        "outcome": record.outcome,
        "why": record.why,
        "trigger": record.trigger,
        "host": record.host,
        "begun": record.begun,
        "seconds": record.seconds,
        "documents": record.documents,
        "tokens": record.tokens,
        "dataset_version": record.version,
        "steps_trained": record.steps_trained,
        "stage": record.did("stage"),
        "loss": losses(record),
        "exported": record.did("exported"),
        "attempts": {step: sum(r.step == step for r in record.steps) for step in record.planned},
    }


def render(records: Iterable[Record], console: Console) -> None:
    """Print runs as a table, the newest first, and below it why some did not end well."""
    table = Table("run", "begun (UTC)", "outcome", "took", "documents", "tokens", "steps", "loss")
    for column in table.columns:
        column.no_wrap = True
    for column in (table.columns[i] for i in (0, 3, 4, 5, 6)):
        column.justify = "right"
    unwell = []
    for record in records:
        table.add_row(
            str(record.number),
            record.begun[5:16].replace("T", " "),
            f"[{_COLOURS[record.outcome]}]{record.outcome}[/]",
            took(record.seconds),
            short(record.documents),
            short(record.tokens),
            short(record.steps_trained),
            " ".join(f"{name[0]} {value:.3f}" for name, value in losses(record).items()),
        )
        if record.outcome not in ("done", "skipped"):
            unwell.append(f"run {record.number} {record.outcome}: {record.why}")
    console.print(table)
    for line in unwell:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def took(seconds: float) -> str:
    """A time in its two largest units."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def status(name: str, recipe: PipelineRecipe) -> dict[str, Any]:
    """Where a pipeline stands; no source is listed for it."""
    state = State(recipe.state)
    newest = next(state.records(), None)
    memory = Memory.of(newest.memory if newest else None)
    steps = newest.planned if newest else []
    given_up = {s: why for s in steps if (why := memory.given_up(s, recipe.retries, memory.inputs))}
    unrecorded = [n for n in state.numbers()[-1:] if state.record(n) is None]
    holder, installed = read_holder(state.lease), Installed.of(state)
    return {
        "name": name,
        "state": str(state.folder),
        "paused": state.paused,
        "holder": str(holder) if holder else None,
        "run_under_way": _under_way(state, unrecorded[0]) if unrecorded else None,
        "last_run": row(newest) if newest else None,
        "last_tick": state.last_tick,
        "given_up": given_up,
        "set_aside": memory.set_aside(recipe.retries),
        "installed": f"{installed.via} on {installed.host}, {installed.at}" if installed else None,
        "next_tick": str(Schedule(installed.at).next_after(datetime.now())) if installed else None,
    }


def _under_way(state: State, number: int) -> dict[str, Any]:
    plan = state.plan(number)
    ended = state.results(number, plan.steps)
    done = {r.step for r in ended if r.outcome in ("done", "skipped")}
    return {
        "run": number,
        "begun": plan.begun,
        "host": plan.host,
        "executor": plan.executor,
        "step": next((step for step in plan.steps if step not in done), None),
        "ended": {r.step: r.why for r in ended},
    }
