"""Commands that make a token dataset, look into it and take care of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.launching import on_cluster, require_local, say, say_queued, show_recipe
from pipelines.cli.options import (
    After,
    AsJson,
    Cluster,
    DatasetArgument,
    DryRun,
    On,
    Overrides,
    Reasons,
    Recipe,
    Version,
    out,
)

if TYPE_CHECKING:
    from pipelines.tokenize.planning import Request

app = typer.Typer()
quarantine_app = typer.Typer(help="What could not be tokenized, and why.", no_args_is_help=True)


@app.command()
def tokenize(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    retire_missing: Annotated[
        bool, typer.Option("--retire-missing", help="Remove the rows of inputs that the sources no longer list.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Retire even more than half of a source.")] = False,
    on: On = "local",
    cluster: Cluster = "cluster/default",
    after: After = None,
) -> None:
    """Turn raw text, pictures and sound into a token dataset.

    Only what is new or changed since the last run is done, exactly once, wherever an earlier run was stopped. With --on slurm
    it runs on a Ray cluster of its own inside one allocation.
    """
    if on_cluster(on):
        options = [*(["--retire-missing"] if retire_missing else []), *(["--force"] if force else [])]
        _tokenize_on_cluster(recipe, overrides or [], options, cluster, after or [], dry_run=dry_run)
        return
    require_local(after=after)
    from pipelines.tokenize.planning import Request

    _tokenize(recipe, overrides, Request(retire_missing=retire_missing, force=force), dry_run=dry_run)


def _tokenize_on_cluster(
    recipe: str, overrides: list[str], options: list[str], cluster: str, after: list[str], *, dry_run: bool
) -> None:
    from pipelines import launch
    from pipelines.recipe import read_recipe
    from pipelines.tokenize.recipe import TokenizeRecipe

    settings, others = launch.read_cluster(cluster, overrides)
    resolved = read_recipe(TokenizeRecipe, recipe, others)
    task = launch.tokenize_task(resolved, options)
    if not dry_run:
        say_queued(launch.launch([task], settings, after=after))
        return
    from pipelines.tokenize.estimate import estimate, render

    show_recipe(resolved)
    say(launch.show([task], settings))
    workers = resolved.workers or launch.tokenize_workers(resolved, settings)
    render(estimate(resolved), out, workers)
    nodes = sum(group.nodes for group in settings.all_groups)
    say(f"One start uses at most {settings.gpu_hours:,.1f} GPU-hours: {nodes} nodes for {settings.time}.")


def _tokenize(recipe: str, overrides: list[str] | None, request: Request, *, dry_run: bool) -> None:
    from pipelines.recipe import dump_recipe, read_recipe
    from pipelines.tokenize.recipe import TokenizeRecipe

    settings = read_recipe(TokenizeRecipe, recipe, overrides or [])
    if dry_run:
        from pipelines.tokenize.estimate import estimate, render

        out.print(dump_recipe(settings), markup=False, highlight=False, soft_wrap=True)
        render(estimate(settings, request), out, settings.workers)
        return
    from pipelines.tokenize.job import tokenize as run
    from pipelines.tokenize.progress import ProgressBar

    with ProgressBar(out) as progress:
        summary = run(settings, progress, request)
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
def verify(dataset: DatasetArgument, version: Version = None) -> None:
    """Read a whole dataset and check it: files, checksums, schema, ids, grammar, counts, row ids, quarantine.

    Exit code 1 on any fault.
    """
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
def quarantine_list(
    dataset: DatasetArgument, reason: Reasons = None, version: Version = None, as_json: AsJson = False
) -> None:
    """List what could not be tokenized, with the reason, and count it by reason."""
    from pipelines.shards.dataset import Dataset

    rows = Dataset.open(dataset, version).quarantined(reason or ())
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        out.print(f"{row['source']}: {row['reason']}: {row['error']}", markup=False, highlight=False, soft_wrap=True)
    for name, count in Counter(row["reason"] for row in rows).most_common():
        out.print(f"{count:,} {name}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{len(rows):,} documents in quarantine.")


@quarantine_app.command("retry")
def quarantine_retry(
    recipe: Recipe, overrides: Overrides = None, reason: Reasons = None, dry_run: DryRun = False
) -> None:
    """Do the units with rejects of the recipe's dataset again, besides what is new or changed.

    For faults that have passed or were mended outside of the inputs. What can be read now gets in, and no row twice.
    """
    from pipelines.tokenize.planning import Request

    _tokenize(recipe, overrides, Request(retry=True, reasons=tuple(reason or ())), dry_run=dry_run)


@app.command()
def vacuum(
    dataset: DatasetArgument,
    dry_run: DryRun = False,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Keep younger files: they may belong to a running job.")
    ] = 24.0,
    keep_versions: Annotated[
        int | None, typer.Option(min=1, help="Drop all but so many versions; by default every version stays.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Name every file.")] = False,
) -> None:
    """Remove files that no version of a dataset needs: what killed and losing attempts have left.

    With --keep-versions also what only older versions need; they cannot be opened any more then.
    """
    from pipelines.shards.dataset import Dataset
    from pipelines.shards.vacuum import vacuum as run

    opened = Dataset.open(dataset)
    done = run(opened, older_than_hours=older_than_hours, keep_versions=keep_versions, dry_run=dry_run)
    for file in done.removed if verbose else ():
        out.print(f"{file.kind}: {file.path}", markup=False, highlight=False, soft_wrap=True)
    kinds = Counter(file.kind for file in done.removed)
    what = ", ".join(f"{count:,} {kind} files" for kind, count in kinds.items()) or "no files"
    verb = "would remove" if dry_run else "removed"
    out.print(
        f"{dataset}: {verb} {what}, {done.size:,} bytes; versions {done.oldest} to {opened.version} stay.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def migrate(dataset: DatasetArgument) -> None:
    """Bring a dataset that an older Braid has written to the format of this one."""
    from pipelines.shards.migrate import migrate as run

    before, after = run(dataset)
    done = "is in" if before == after else f"was in format {before} and is now in"
    out.print(f"{dataset}: {done} format {after}.", markup=False, highlight=False, soft_wrap=True)
