"""The command `braid`; it only parses and calls. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="braid",
    help="Raw text, images and audio to one token stream, and one transformer on it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
tokenizer_app = typer.Typer(help="Train the image and audio tokenizers.", no_args_is_help=True)
quarantine_app = typer.Typer(help="What could not be tokenized, and why.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(quarantine_app, name="quarantine")

out = Console()
err = Console(stderr=True)

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that win over the file: a.b=value ...")]
DatasetArgument = Annotated[str, typer.Argument(help="Folder or URI of a token dataset.")]
Version = Annotated[int | None, typer.Option(min=0, help="A pinned version; the newest by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Run the command; a fault that Braid itself found ends in one message, not in a traceback."""
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
def pretrain(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a model on a token dataset; the same command goes on after a stop, from the last checkpoint.

    On several GPUs of one machine: torchrun --nproc-per-node N -m pipelines.cli pretrain RECIPE.
    """
    from pipelines.pretrain import main as run

    result = run(recipe, overrides or [])
    if result.already_finished:
        out.print(f"{result.folder}: nothing to do, all {result.steps:,} steps are done.", markup=False, soft_wrap=True)
    if result.validation and result.baseline:
        from pipelines.report.losses import validation_table

        out.print(validation_table(result.validation.items(), result.baseline.items()))
    out.print(f"The model is in {result.model}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder, or the folder of an exported model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    want: Annotated[list[str] | None, typer.Option(help="text, image or audio; may be given several times.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the files go.")] = Path("generated"),
    image: Annotated[Path | None, typer.Option(help="A picture as prompt, after the text.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound as prompt, after text and picture.")] = None,
    samples: Annotated[int, typer.Option(help="Continuations to make.")] = 1,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep the fewest likeliest tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this times as likely as the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="The most pieces of a text.")] = 256,
    seconds: Annotated[float | None, typer.Option(help="Length of a sound; the model's choice by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU by default, where there is one.")] = None,
) -> None:
    """Let a trained model write, draw and speak: .txt, .png and .wav files with their settings beside them."""
    from pipelines.generate import Sampling
    from pipelines.generate import generate as run
    from pipelines.generate.progress import ProgressBar

    with ProgressBar(out) as progress:
        made = run(
            checkpoint,
            prompt=[item for item in (prompt, image, audio) if item],
            want=want or ["text"],
            out=folder,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
            samples=samples,
            seed=seed,
            max_tokens=max_tokens,
            seconds=seconds,
            device=device,
            watcher=progress,
        )
    for sample in made:
        for span, file in zip(sample.spans, sample.files, strict=True):
            out.print(f"{file}  {span.describe()}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a pretraining run, finished or not.")],
    dataset: Annotated[str | None, typer.Option(help="The token dataset, to show what went in.")] = None,
    version: Version = None,
    generated: Annotated[Path | None, typer.Option(help="Folder that `braid generate --out` wrote.")] = None,
    page: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    row: Annotated[list[str] | None, typer.Option(help="A row of the dataset to show; some of all by default.")] = None,
    title: Annotated[str | None, typer.Option(help="By default the run's name.")] = None,
) -> None:
    """Write one HTML page: what went in, how it learned, what came out."""
    from pipelines.report.page import report as write

    written = write(page, run=run, dataset=dataset, version=version, generated=generated, rows=row or 12, title=title)
    out.print(f"Open {written}", markup=False, highlight=False, soft_wrap=True)


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


@tokenizer_app.command(
    "train", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def tokenizer_train(
    context: typer.Context,
    kind: Annotated[
        str, typer.Argument(help="image or audio; `braid tokenizer train image --help` lists the options.")
    ],
) -> None:
    """Train a tokenizer on a folder of pictures or of sounds: `braid tokenizer train image --data DIR --out DIR`."""
    if kind not in ("image", "audio"):
        err.print(f"[bold red]error:[/] kind {kind!r}: what to train is image or audio", highlight=False)
        raise typer.Exit(2)
    import importlib

    importlib.import_module(f"pipelines.tokenizers.train_{kind}").main(context.args)


if __name__ == "__main__":
    main()
