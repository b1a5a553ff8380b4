"""What the commands that may run on a cluster share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from pipelines.cli.options import out

if TYPE_CHECKING:
    from pydantic import BaseModel

    from slurm.submission import JobHandle

_PLACES = ("local", "slurm")


def on_cluster(on: str) -> bool:
    """Whether `--on` names a cluster."""
    if on not in _PLACES:
        raise typer.BadParameter(f"{on}: write one of {', '.join(_PLACES)}", param_hint="--on")
    return on == "slurm"


def require_local(*, sweep: Sequence[str] | None = None, after: Sequence[str] | None = None) -> None:
    """Refuse options that mean nothing here."""
    for name, value in (("--sweep", sweep), ("--after", after)):
        if value:
            raise typer.BadParameter("this makes jobs of a cluster; add --on slurm", param_hint=name)


def say(text: str) -> None:
    """Print as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def show_recipe(settings: BaseModel) -> None:
    """Print a resolved recipe."""
    from pipelines.recipe import dump_recipe

    say(dump_recipe(settings))


def say_queued(job: JobHandle) -> None:
    """Name a job, its folder, and what to do next."""
    say(f"Job {job.id} is queued{f' as {len(job.tasks)} jobs' if job.tasks else ''}; its files are in {job.folder}")
    say(f"braid jobs show {job.id}; braid jobs logs -f {job.id}")
