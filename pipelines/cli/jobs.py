"""Commands around jobs on a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

import typer

from pipelines.cli.launching import say, say_queued
from pipelines.cli.options import AsJson, out

app = typer.Typer(help="Jobs on the cluster: what they do, what they say, and how they went.", no_args_is_help=True)

Job = Annotated[str, typer.Argument(help="A job's id.")]


@app.command("list")
def list_(
    days: Annotated[float, typer.Option(min=0, help="Of the last so many days.")] = 7.0,
    as_json: AsJson = False,
) -> None:
    """Braid's jobs: state, restarts, step, loss and speed."""
    from pipelines.jobs import listed

    jobs = listed(days)
    if as_json:
        print(json.dumps(jobs, indent=2))
        return
    from rich.table import Table

    table = Table("job", "name", "state", "nodes", "starts", "time", "progress")
    for job in jobs:
        starts, lasted = str(len(job["attempts"])), _lasted(job)
        table.add_row(job["id"], job["name"], job["state"], job["nodes"], starts, lasted, _progress(job["figures"]))
    out.print(table)


@app.command()
def show(job: Job, as_json: AsJson = False) -> None:
    """One job: why it waits, where it ran, every start and why it ended, how far it is."""
    from pipelines.jobs import show as run

    found = run(job)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    say(
        f"{found['id']}  {found['name']}  {found['kind']}  {found['state']}"
        + (f": {found['why']}" if found["why"] else "")
    )
    say(f"  run      {found['run']}")
    say(f"  files    {found['folder']}")
    say(f"  limit    {found['time_limit']} a start")
    if progress := _progress(found["figures"]):
        say(f"  progress {progress}")
    for attempt in found["attempts"]:
        ended = f" to {_clock(attempt['ended'])}" if attempt["ended"] else ""
        why = f": {attempt['why']}" if attempt["why"] else ""
        where, began = attempt["nodes"] or "?", _clock(attempt["started"])
        say(f"  start {attempt['number'] + 1}  {attempt['state']} on {where}, {began}{ended}{why}")


@app.command()
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Only this task's lines; all merged by default.")] = None,
) -> None:
    """What the tasks say, merged, each line with its task's number."""
    from slurm.logs import read
    from slurm.status import status

    found = status(job)
    ended = (lambda: not status(job, found.folder).active) if follow else None
    for task, line in read(found.folder, job, task=rank, ended=ended):
        say(line if rank is not None else f"{task}: {line}")


@app.command()
def cancel(jobs: Annotated[list[str], typer.Argument(help="Ids of jobs.")]) -> None:
    """End jobs, running or not; what they have saved stays."""
    from slurm.commands import run
    from slurm.status import status

    for job in jobs:
        found = status(job)
        if not found.active:
            say(f"Job {job} has ended already: {found.state}")
            continue
        run("scancel", job)
        say(f"Job {job} is cancelled; braid jobs resume {job} goes on with it")


@app.command()
def resume(job: Job) -> None:
    """Submit a job again that failed or was cancelled: same recipe, same code; it goes on from what it has saved."""
    from pipelines.jobs import resume as run

    say_queued(run(job))


@app.command()
def wait(
    job: Job,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout-s", min=0, help="Give up after so many seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a job has ended. Exit code 0 if it ended well, 1 if not, 2 if the time was over first."""
    from pipelines.jobs import joined
    from pipelines.jobs import wait as run

    last = None
    for last in run(job, timeout_s):
        if not as_json:
            say(f"{datetime.now():%H:%M:%S}  {last.state}" + (f": {last.why}" if last.why else ""))
    assert last is not None
    if as_json:
        print(json.dumps(joined(last), indent=2))
    if last.active:
        raise typer.Exit(2)
    if not last.succeeded:
        raise typer.Exit(1)


def _progress(figures: Mapping[str, Any]) -> str:
    parts = []
    if "step" in figures:
        parts.append(f"step {figures['step']:,}" + (f" of {figures['steps']:,}" if "steps" in figures else ""))
        parts += [f"{name} {value:.3f}" for name, value in figures["loss"].items() if value is not None]
        parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
    if "documents" in figures:
        tokens = sum(figures["tokens"].values()) if isinstance(figures["tokens"], dict) else figures["tokens"]
        parts.append(f"version {figures['version']}, {figures['documents']:,} documents, {tokens:,} tokens")
    return "  ".join(parts)


def _lasted(job: Mapping[str, Any]) -> str:
    spans = [(a["ended"] or time.time()) - a["started"] for a in job["attempts"] if a["started"]]
    seconds = int(sum(spans))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _clock(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}" if at else "?"
