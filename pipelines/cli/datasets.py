"""Commands that make a token dataset, look into it and take care of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import AsJson, DatasetArgument, Overrides, Recipe, Version, out

app = typer.Typer()
quarantine_app = typer.Typer(help="What could not be tokenized, and why.", no_args_is_help=True)


@app.command()
def tokenize(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Turn raw text, pictures and sound into a token dataset.

    Only what is new or changed since the last run is done, exactly once, wherever an earlier run was stopped.
    """
    from pipelines.recipe import dump_recipe, read_recipe
    from pipelines.tokenize.recipe import TokenizeRecipe

    settings = read_recipe(TokenizeRecipe, recipe, overrides or [])
    if dry_run:
        from pipelines.tokenize.estimate import estimate, render

        out.print(dump_recipe(settings), markup=False, highlight=False, soft_wrap=True)
        render(estimate(settings), out, settings.workers)
        return
    from pipelines.tokenize.job import tokenize as run
    from pipelines.tokenize.progress import ProgressBar

    with ProgressBar(out) as progress:
        summary = run(settings, progress)
    if not summary.units:
        out.print(
            f"{summary.dataset}: nothing to do, all {summary.already_done:,} units are in version {summary.version}."
        )
        return
    tokens = ", ".join(f"{count:,} {modality}" for modality, count in summary.tokens.items())
    out.print(
        f"{summary.dataset}: version {summary.version} has {summary.documents:,} new documents ({tokens} tokens), "
        f"{summary.rejects:,} in quarantine; {summary.units:,} units in {summary.seconds:.0f} s.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def stats(dataset: DatasetArgument, version: Version = None, as_json: AsJson = False) -> None:
    """Say what is in a token dataset: documents, tokens, lengths, codebook use, quarantine."""
    from pipelines.report.summary import render, summarize
    from pipelines.shards.dataset import Dataset

    figures = summarize(Dataset.open(dataset, version))
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        render(figures, out)


@app.command()
def show(
    dataset: DatasetArgument,
    rows: Annotated[list[str], typer.Argument(help="Rows, each by its index, or by its id or a beginning of it.")],
    folder: Annotated[Path | None, typer.Option("--out", help="Write text, PNG and WAV files there.")] = None,
    version: Version = None,
) -> None:
    """Turn rows back into text, pictures and sound."""
    from pipelines.shards.dataset import Dataset
    from pipelines.show import show as run

    for shown in run(Dataset.open(dataset, version), rows, folder):
        out.print(
            f"row {shown.row_id[:12]} from {shown.source}, {shown.num_tokens:,} tokens",
            style="bold",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        for span, file in zip(shown.spans, shown.files, strict=True):
            where = f"  -> {file}" if file else ""
            out.print(
                f"  {span.modality.label:5}  {span.describe()}{where}", markup=False, highlight=False, soft_wrap=True
            )


@app.command()
def verify(dataset: DatasetArgument, version: Version = None) -> None:
    """Read a whole dataset and check it: checksums, schema, ids, grammar, counts, row ids. Exit code 1 on any fault."""
    from pipelines.shards.dataset import Dataset
    from pipelines.shards.verify import verify as run

    opened = Dataset.open(dataset, version)
    faults = 0
    for fault in run(opened):
        faults += 1
        row = f" row {fault.row}" if fault.row else ""
        out.print(f"{fault.shard}{row}: {fault.what}", markup=False, highlight=False, soft_wrap=True)
    shards = opened.shards()
    out.print(
        f"{faults:,} faults in {sum(s.rows for s in shards):,} rows of {len(shards):,} shards, version {opened.version}."
    )
    if faults:
        raise typer.Exit(1)


@quarantine_app.command("list")
def quarantine_list(dataset: DatasetArgument, version: Version = None, as_json: AsJson = False) -> None:
    """List what could not be tokenized, with the reason."""
    from pipelines.shards.dataset import Dataset

    rows = Dataset.open(dataset, version).quarantined()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        out.print(f"{row['source']}: {row['reason']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{len(rows):,} documents in quarantine.")
