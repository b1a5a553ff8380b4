"""Commands that look after the checkpoints of pretraining runs, and compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.options import AsJson, err, out

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify and export the checkpoints of a run.")
runs_app = typer.Typer(no_args_is_help=True, help="List, show and compare pretraining runs.")

Run = Annotated[Path, typer.Argument(help="Folder of a pretraining run.")]


@checkpoint_app.command("list")
def list_(run: Run, as_json: AsJson = False) -> None:
    """The checkpoints of a run: step, size, ranks, when."""
    from pipelines.pretrain.inventory import checkpoints_of, checkpoints_table

    found = checkpoints_of(run)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        out.print(checkpoints_table(run, found))


@checkpoint_app.command()
def verify(
    where: Annotated[Path, typer.Argument(help="Folder of a run, for all of its checkpoints, or of one checkpoint.")],
) -> None:
    """Read every byte of checkpoints and compare it with its checksum; exit code 1 if any is damaged."""
    from pipelines.pretrain.checkpoint import CheckpointError, verify_checkpoint
    from pipelines.pretrain.inventory import checkpoints_below

    bad = 0
    for path in checkpoints_below(where):
        try:
            record = verify_checkpoint(path)
            out.print(f"{path.name}: whole, {record.step:,} steps", markup=False, highlight=False, soft_wrap=True)
        except CheckpointError as error:
            bad += 1
            err.print(str(error), style="bold red", markup=False, soft_wrap=True)
    if bad:
        raise typer.Exit(1)


@checkpoint_app.command()
def export(
    where: Annotated[Path, typer.Argument(help="Folder of a run, for its newest checkpoint, or of one checkpoint.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for model.safetensors, config.json, vocabulary.json.")],
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(help="Round the weights to it: bf16 takes half of the room. Default: as the checkpoint has them."),
    ] = None,
) -> None:
    """Export the model of a checkpoint, as a finished run's; `braid generate` reads it."""
    import torch

    from pipelines.pretrain.export import export_checkpoint
    from pipelines.pretrain.inventory import checkpoints_below

    path = checkpoints_below(where)[-1]
    types = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    export_checkpoint(path, folder, dtype=types[dtype])
    out.print(f"{path.name} is exported to {folder}", markup=False, highlight=False, soft_wrap=True)


@runs_app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders, at any depth.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """The runs below a folder: steps, losses, speed, whether they are finished."""
    from pipelines.pretrain.inventory import find_runs, runs_table, summary

    found = [summary(run) for run in find_runs(folder)]
    if as_json:
        out.print_json(json.dumps(found))
    else:
        out.print(runs_table(found))


@runs_app.command()
def show(run: Run, as_json: AsJson = False) -> None:
    """One run: how far it is, its losses beside token frequencies, its speed, its checkpoints."""
    from pipelines.pretrain.inventory import checkpoints_of, checkpoints_table, datasets_table, runs_table, summary
    from pipelines.report.losses import validation_table
    from pipelines.report.training import read_run

    told = summary(run)
    if as_json:
        out.print_json(json.dumps(told | {"checkpoints": checkpoints_of(run)}))
        return
    out.print(runs_table([told]))
    if len(told["datasets"] or {}) > 1:
        out.print(datasets_table(told["datasets"]))
    read = read_run(run)
    if read.last and read.baseline:
        out.print(validation_table(read.last.items(), read.baseline.items()))
    out.print(checkpoints_table(run, checkpoints_of(run)))


@runs_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two runs or more.")],
    page: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("runs.html"),
) -> None:
    """Runs side by side: a table, and one HTML page with their curves and what differs in their recipes."""
    from pipelines.pretrain.inventory import runs_table, summary
    from pipelines.report.comparison import compare as write

    out.print(runs_table([summary(run) for run in runs]))
    out.print(f"Open {write(page, runs)}", markup=False, highlight=False, soft_wrap=True)
