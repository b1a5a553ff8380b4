"""Commands of pipelines that run by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import out

if TYPE_CHECKING:
    from pipelines.recurring.recipe import PipelineRecipe
    from pipelines.recurring.tick import Ticked

app = typer.Typer(help="Pipelines that run by themselves: what arrived, exactly once.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A pipeline's recipe: a file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that win over the file: a.b=value ...")]

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
    from pipelines.recurring.history import write_page
    from pipelines.recurring.state import State
    from pipelines.recurring.tick import tick as reconcile

    named, recipe = _read(name, overrides)
    ticked: Ticked = reconcile(named, recipe, trigger)
    _say(f"{named}: {ticked.said}")
    if ticked.record:
        write_page(State(recipe.state), named)
        for alert in ticked.record.alerts:
            if alert["error"]:
                _say(f"{named}: alert {alert['event']} to {alert['to']} failed: {alert['error']}")
        if code := EXIT_CODES[ticked.record.outcome]:
            raise typer.Exit(code)


def _read(name: str, overrides: list[str] | None = None) -> tuple[str, PipelineRecipe]:
    from pipelines.recipe import read_recipe
    from pipelines.recurring.recipe import PipelineRecipe, pipeline_path

    path = pipeline_path(name)
    return path.stem, read_recipe(PipelineRecipe, path, overrides or [])


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
