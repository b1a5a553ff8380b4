"""The command that measures a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import AsJson, DatasetArgument, Model, Version, err, out

app = typer.Typer()


@app.command()
def evaluate(
    checkpoint: Model,
    dataset: DatasetArgument,
    version: Version = None,
    split: Annotated[str, typer.Option(help="validation, or train.")] = "validation",
    limit: Annotated[
        int | None, typer.Option(min=1, help="So many documents, drawn by the seed; all by default.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Let it draw, speak and write, too.")
    ] = True,
    samples: Annotated[int, typer.Option(min=2, help="Samples to generate in each direction.")] = 12,
    temperature: Annotated[float, typer.Option(help="Of generated pictures and sounds.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Of generated pictures and sounds: keep the k likeliest.")] = None,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance of generated pictures and sounds.")] = 1.0,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with samples: one file with everything inside.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU by default, where there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out documents: losses, bits, accuracy, calibration, cross-modal gain, what it generates.

    Every figure stands beside its baseline: token frequencies, shuffled pairs, and what the tokenizers alone lose.
    """
    from pipelines.evaluate import evaluate as run
    from pipelines.evaluate.terminal import render
    from pipelines.generate import ProgressBar, Sampling

    found = run(
        checkpoint,
        dataset,
        version=version,
        split=split,
        limit=limit,
        generate=generate,
        samples=samples,
        sampling=Sampling(temperature=temperature, top_k=top_k, guidance=guidance),
        seed=seed,
        device=device,
        watch=lambda label: ProgressBar(err, label),
    )
    if html:
        from pipelines.evaluate.page import write_evaluation_page

        err.print(f"Open {write_evaluation_page(html, found)}", markup=False, highlight=False, soft_wrap=True)
    print(json.dumps(found.figures, indent=2, allow_nan=False)) if as_json else render(found.figures, out)
