"""Commands that train a model, let it speak and report on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.launching import on_cluster, require_local, say, say_queued, show_recipe
from pipelines.cli.options import After, Cluster, DryRun, Model, On, Overrides, Recipe, Version, out
from pipelines.cli.prompts import InOrder, by_modality, prompt_items

app = typer.Typer()


@app.command()
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    on: On = "local",
    cluster: Cluster = "cluster/default",
    after: After = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", help="With --on slurm: KEY=VALUE,VALUE; one job for each, or for each combination."),
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Jobs of a sweep that may run at a time.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="With --dry-run, here: plan for so many GPUs.")] = 1,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="With --dry-run, here: what one of them reaches on large products.")
    ] = None,
) -> None:
    """Train a model on a token dataset; repeat the command to resume from the last checkpoint.

    On several GPUs of one machine: torchrun --nproc-per-node N -m pipelines.cli pretrain RECIPE. On a cluster: --on slurm.
    """
    if on_cluster(on):
        from pipelines import launch

        settings, others = launch.read_cluster(cluster, overrides or [])
        recipes = launch.swept(recipe, others, sweep or [])
        tasks = [launch.pretrain_task(each) for each in recipes]
        if dry_run:
            for each in recipes:
                show_recipe(each)
            say(launch.show(tasks, settings))
            say(launch.pretrain_cost(recipes, settings))
            return
        say_queued(launch.launch(tasks, settings, after=after or [], at_once=at_once))
        return
    require_local(sweep=sweep, after=after)
    if dry_run:
        from pipelines.pretrain.plan import dry_run as plan
        from pipelines.pretrain.recipe import PretrainRecipe
        from pipelines.recipe import read_recipe

        resolved = read_recipe(PretrainRecipe, recipe, overrides or [])
        show_recipe(resolved)
        say(plan(resolved, gpus=gpus, tflops=tflops))
        return
    from pipelines.pretrain import main as run

    result = run(recipe, overrides or [])
    if result.already_finished:
        out.print(f"{result.folder}: nothing to do, all {result.steps:,} steps are done.", markup=False, soft_wrap=True)
    if result.validation and result.baseline:
        from pipelines.report.losses import validation_table

        out.print(validation_table(result.validation.items(), result.baseline.items()))
    out.print(f"The model is in {result.model}", markup=False, highlight=False, soft_wrap=True)


@app.command(cls=InOrder)
def generate(
    context: typer.Context,
    checkpoint: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue.")] = None,
    want: Annotated[list[str] | None, typer.Option(help="text, image or audio; may be given several times.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the files go.")] = Path("generated"),
    image: Annotated[list[Path] | None, typer.Option(help="A picture as prompt.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound as prompt.")] = None,
    samples: Annotated[int, typer.Option(help="Continuations to make.")] = 1,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Keep the fewest likeliest tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens at least this times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[
        list[str] | None, typer.Option(help="Above 1 makes what is there less likely: 1.2, or by modality text=1.2.")
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(help="Classifier-free guidance of pictures and sounds: above 1 they follow the prompt more."),
    ] = 1.0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the first sample's text as it comes.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="The most pieces of a text.")] = 256,
    seconds: Annotated[float | None, typer.Option(help="Length of a sound; the model's choice by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU by default, where there is one.")] = None,
) -> None:
    """Let a trained model write, draw and speak: .txt, .png and .wav files with their settings beside them.

    --prompt, --image and --audio may be repeated and stand in the prompt in the order in which they are given.
    """
    from contextlib import nullcontext

    from pipelines.generate import Sampling
    from pipelines.generate import generate as run
    from pipelines.generate.progress import ProgressBar
    from pipelines.sequence import Modality

    penalties = by_modality(repetition_penalty or [], "--repetition-penalty")
    sampling = {
        m.label: Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=penalties.get(m.label, 1.0),
            guidance=1.0 if m is Modality.TEXT else guidance,
        )
        for m in Modality
    }

    def told(sample: int, text: str) -> None:
        if sample == 0:
            out.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    # A bar would be drawn over the text.
    with nullcontext() if stream else ProgressBar(out) as progress:
        made = run(
            checkpoint,
            prompt=[Path(value) if name != "prompt" else value for name, value in prompt_items(context) if value],
            want=want or ["text"],
            out=folder,
            sampling=sampling,
            samples=samples,
            seed=seed,
            max_tokens=max_tokens,
            seconds=seconds,
            device=device,
            watcher=progress,
            on_text=told if stream else None,
        )
    if stream:
        out.print()
    for sample in made:
        for span, file in zip(sample.spans, sample.files, strict=True):
            out.print(f"{file}  {span.describe()}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a pretraining run, finished or not; none shows the rest alone.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The token dataset, to show what went in.")] = None,
    version: Version = None,
    generated: Annotated[Path | None, typer.Option(help="Folder that `braid generate --out` wrote.")] = None,
    page: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    row: Annotated[list[str] | None, typer.Option(help="A row of the dataset to show; some of all by default.")] = None,
    title: Annotated[str | None, typer.Option(help="By default the name of the first that is shown.")] = None,
) -> None:
    """Write one HTML page: what went in, how it learned, what came out."""
    from pipelines.report.page import report as write

    if run is None and dataset is None and generated is None:
        raise typer.BadParameter("there is nothing to show: name a run, --dataset or --generated")
    written = write(page, run=run, dataset=dataset, version=version, generated=generated, rows=row or 12, title=title)
    out.print(f"Open {written}", markup=False, highlight=False, soft_wrap=True)
