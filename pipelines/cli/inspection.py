"""Commands that look into a token dataset: its figures, its rows, and any question in SQL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson, DatasetArgument, Version, out

if TYPE_CHECKING:
    pass

app = typer.Typer()


@app.command()
def stats(
    dataset: DatasetArgument,
    version: Version = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead: one file, with samples.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents that the page shows, decoded.")] = 48,
    as_json: AsJson = False,
) -> None:
    """Say what is in a token dataset: documents, tokens, lengths, codebook use, shards, padding, growth, quarantine."""
    from pipelines.shards.dataset import Dataset

    opened = Dataset.open(dataset, version)
    if html:
        from pipelines.report.stats_page import write_stats_page

        out.print(
            f"Open {write_stats_page(html, opened, samples=samples)}", markup=False, highlight=False, soft_wrap=True
        )
    if html and not as_json:
        return
    from pipelines.report.summary import summarize

    figures = summarize(opened)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        from pipelines.report.terminal import render

        render(figures, out)


@app.command()
def show(
    dataset: DatasetArgument,
    rows: Annotated[
        list[str] | None, typer.Argument(help="Rows, each by its index, or by its id or a beginning of it.")
    ] = None,
    source: Annotated[str, typer.Option(help="Search: a source's name, or a glob such as 'stamps/*apple*'.")] = "",
    modality: Annotated[
        list[str] | None, typer.Option(help="Search: documents with text, image or audio; may be repeated.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(min=0, help="Search: documents of at least so many tokens.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="Search: documents of at most so many tokens.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most rows that a search shows.")] = 5,
    folder: Annotated[Path | None, typer.Option("--out", help="Write text, PNG and WAV files there.")] = None,
    version: Version = None,
) -> None:
    """Turn rows back into text, pictures and sound: named ones, or the first that a search finds."""
    from pipelines.rows import Search, StoredRow
    from pipelines.rows import search as find
    from pipelines.sequence import Modality
    from pipelines.shards.dataset import Dataset
    from pipelines.show import show as run
    from pipelines.show_terminal import print_row

    labels = {m.label: m for m in Modality}
    if unknown := sorted(set(modality or ()) - labels.keys()):
        raise typer.BadParameter(f"{unknown[0]} is no modality: text, image or audio", param_hint="--modality")
    wanted = Search(
        source=source,
        modalities=tuple(labels[name] for name in modality or ()),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
    )
    if bool(rows) == (wanted != Search()):
        raise typer.BadParameter("name rows, or search with --source, --modality, --min-tokens or --max-tokens")
    opened = Dataset.open(dataset, version)
    found: list[str | StoredRow] = [*rows] if rows else [*find(opened, wanted, limit)]
    for shown in run(opened, found, folder):
        print_row(shown, out)
    if not found:
        out.print("No such document.")
