"""Commands of pipelines that run by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson, Overrides, out

if TYPE_CHECKING:
    from pipelines.recurring.recipe import PipelineRecipe

app = typer.Typer(help="Pipelines that run by themselves: what arrived, exactly once.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A pipeline's recipe, or the name of an installed or a shipped one.")]

EXIT_CODES = {"done": 0, "skipped": 0, "refused": 1, "failed": 1, "lost": 1}


@app.command()
def tick(name: Name, overrides: Overrides = None) -> None:
    """Do what is due, and nothing if nothing is: as often as one likes, from several machines at once.

    Exit code 1 if a step failed or refused.
    """
    _tick(name, overrides, "tick")


@app.command()
def run(
    name: Name,
    overrides: Overrides = None,
    backfill: Annotated[
        bool, typer.Option("--backfill", help="Do not wait for conditions: all that is not done yet is due.")
    ] = False,
) -> None:
    """Do what is due now, by hand: also while it is paused, and what was given up after failures."""
    _tick(name, overrides, "backfill" if backfill else "run")


def _tick(name: str, overrides: list[str] | None, trigger: str) -> None:
    from pipelines.recurring.state import State
    from pipelines.recurring.tick import tick as reconcile

    named, recipe = _read(name, overrides)
    ticked = reconcile(named, recipe, trigger)
    _say(f"{named}: {ticked.said}")
    if ticked.record:
        from pipelines.recurring.page import write_page

        write_page(State(recipe.state), named)
        for alert in ticked.record.alerts:
            if alert["error"]:
                _say(f"{named}: alert {alert['event']} to {alert['to']} failed: {alert['error']}")
        if code := EXIT_CODES[ticked.record.outcome]:
            raise typer.Exit(code)


@app.command()
def install(
    name: Name,
    via: Annotated[str, typer.Option(help="Who keeps the time: cron, scrontab (SLURM) or systemd.")],
    at: Annotated[str, typer.Option(help="02:30, hourly, daily, weekly, or five fields as in a crontab.")],
    overrides: Overrides = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="For scrontab: an option of sbatch, such as --partition=main; may be repeated."),
    ] = None,
) -> None:
    """Let a scheduler call `tick`, in this folder and with this Python; installing again replaces the entry."""
    from pipelines.recurring.entries import install as put
    from pipelines.recurring.recipe import pipeline_path
    from pipelines.recurring.state import State

    named, recipe = _read(name, overrides)
    done = put(named, pipeline_path(name), overrides or [], State(recipe.state), via, at, option or [])
    _say(f"{named}: {done.via} on {done.host} ticks it at '{done.at}'; `braid pipeline doctor {name}` looks after it.")


@app.command()
def remove(name: Name, overrides: Overrides = None) -> None:
    """Remove a pipeline's entries from the schedulers of this machine; its state stays."""
    from pipelines.recurring.entries import remove as drop
    from pipelines.recurring.state import State

    named, recipe = _read(name, overrides)
    gone = drop(named, State(recipe.state))
    _say(f"{named}: removed from {', '.join(gone)}." if gone else f"{named}: no scheduler here has an entry of it.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the pipelines that the schedulers of this machine tick for this user."""
    from dataclasses import asdict

    from pipelines.recurring.entries import all_entries

    entries = all_entries()
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        state = "" if entry.enabled else "  DISABLED"
        _say(f"{entry.name}  {entry.via}  {entry.at}  {Path(entry.script).parent}{state}")
    if not entries:
        _say("No scheduler here has a pipeline of this user; `braid pipeline install` adds one.")


@app.command()
def status(name: Name, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say where a pipeline stands: who works on it, the last run, what is given up, the next tick."""
    from pipelines.recurring.history import status as look

    named, recipe = _read(name, overrides)
    found = look(named, recipe)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    last, tick_, under_way = found["last_run"], found["last_tick"], found["run_under_way"]
    lines = [
        ("state", found["state"]),
        ("paused", f"by {found['paused']['by']} at {found['paused']['at']}" if found["paused"] else ""),
        ("lease", found["holder"] or "free"),
        ("run under way", f"{under_way['run']} on {under_way['host']}, in {under_way['step']}" if under_way else ""),
        ("last run", f"{last['run']} {last['outcome']}, {last['begun']}: {last['why']}" if last else "none"),
        ("last tick", f"{tick_['at']} on {tick_['host']}: {tick_['said']}" if tick_ else "none"),
        ("given up", "; ".join(f"{step}: {why}" for step, why in found["given_up"].items())),
        ("set aside", ", ".join(found["set_aside"])),
        ("installed", found["installed"] or "no"),
        ("next tick", found["next_tick"] or ""),
    ]
    for what, text in lines:
        if text:
            _say(f"{what + ':':15} {text}")


@app.command()
def history(
    name: Name,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Runs to show.")] = 20,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page there instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show past runs: outcome, duration, new documents and tokens, steps, losses."""
    from pipelines.recurring.history import render, row
    from pipelines.recurring.state import State

    named, recipe = _read(name, overrides)
    state = State(recipe.state)
    if html:
        from pipelines.recurring.page import write_page

        _say(f"Open {write_page(state, named, html)}")
    elif as_json:
        print(json.dumps([row(record) for record in state.records(count)], indent=2))
    else:
        render(state.records(count), out)


@app.command()
def pause(
    name: Name, overrides: Overrides = None, why: Annotated[str, typer.Option(help="For those who wonder.")] = ""
) -> None:
    """Let ticks do nothing until `resume`; a run that is under way ends first."""
    from pipelines.recurring.lease import whoami
    from pipelines.recurring.state import State

    named, recipe = _read(name, overrides)
    State(recipe.state).pause(whoami(), why)
    _say(f"{named}: paused; `braid pipeline resume {name}` ends that.")


@app.command()
def resume(name: Name, overrides: Overrides = None) -> None:
    """Let ticks work again; what has come meanwhile is done with the next one."""
    from pipelines.recurring.state import State

    named, recipe = _read(name, overrides)
    _say(f"{named}: {'goes on' if State(recipe.state).resume() else 'was not paused'}.")


@app.command()
def doctor(name: Name, overrides: Overrides = None) -> None:
    """Check everything that ticks need: recipes, state folder, the scheduler's entry, the last tick, what was given up.

    Exit code 1 on any fault.
    """
    from pipelines.recurring.doctor import examine

    _, recipe = _read(name, overrides)
    faults = 0
    for finding in examine(name, recipe):
        faults += finding.level == "fault"
        _say(f"{finding.level + ':':7} {finding.text}")
    if faults:
        raise typer.Exit(1)


def _read(name: str, overrides: list[str] | None = None) -> tuple[str, PipelineRecipe]:
    from pipelines.recipe import read_recipe
    from pipelines.recurring.recipe import PipelineRecipe, pipeline_path

    path = pipeline_path(name)
    return path.stem, read_recipe(PipelineRecipe, path, overrides or [])


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
