"""The command `braid`; it only parses and calls. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import os
import sys

import typer

from pipelines.cli import datasets, evaluation, inspection, jobs, pipeline, runs, tokenizers, training
from pipelines.cli.options import err

app = typer.Typer(
    name="braid",
    help="Raw text, images and audio to one token stream, and one transformer on it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for group in (datasets.app, inspection.app, training.app, evaluation.app):
    app.add_typer(group)
app.add_typer(datasets.quarantine_app, name="quarantine")
app.add_typer(tokenizers.app, name="tokenizer")
app.add_typer(pipeline.app, name="pipeline")
app.add_typer(runs.checkpoint_app, name="checkpoint")
app.add_typer(runs.runs_app, name="runs")
app.add_typer(jobs.app, name="jobs")


def main() -> None:
    """Run the command; a fault that Braid itself found ends in one message, not in a traceback."""
    # Before torch is loaded. Threads of OpenMP that wait actively for one that another process keeps from running cost more
    # than waking them: beside one busy process on two cores a model drew in 47 s, and so in 7.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except Exception as error:
        # Braid's own errors are messages for the user. Anything else is a bug, and its traceback belongs on the screen.
        if type(error).__module__.partition(".")[0] not in ("pipelines", "model", "slurm"):
            raise
        err.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(2 if type(error).__name__ == "RecipeError" else 1)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
