"""Commands that look into a token dataset: its figures, its rows, and any question in SQL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson, DatasetArgument, Version, err, out

if TYPE_CHECKING:
    pass

app = typer.Typer()


@app.command()
def stats(
    dataset: Annotated[str | None, typer.Argument(help="Folder or URI of a token dataset.")] = None,
    version: Version = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Compare two: versions of DATASET or, without it, datasets; DATASET@VERSION pins one."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page: one file with everything inside.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents that the page shows, decoded.")] = 48,
    as_json: AsJson = False,
) -> None:
    """Say what is in a token dataset: documents, tokens, lengths, codebook use, shards, padding, growth, quarantine."""
    if diff:
        if version is not None:
            raise typer.BadParameter("--diff names its versions itself: --diff 3 7", param_hint="--version")
        _compare(dataset, diff, html, as_json=as_json)
        return
    if dataset is None:
        raise typer.BadParameter("name a dataset, or two with --diff")
    from pipelines.shards.dataset import Dataset

    opened = Dataset.open(dataset, version)
    if html:
        from pipelines.report.stats_page import write_stats_page

        _written(write_stats_page(html, opened, samples=samples))
    if as_json or not html:
        from pipelines.report.summary import summarize
        from pipelines.report.terminal import render

        figures = summarize(opened)
        print(json.dumps(figures, indent=2)) if as_json else render(figures, out)


def _compare(dataset: str | None, names: tuple[str, str], html: Path | None, *, as_json: bool) -> None:
    from pipelines.report.difference import Side, compare, opened
    from pipelines.report.difference_page import render_difference, write_difference_page

    a, b = (Side.of(opened(name, dataset)) for name in names)
    told = compare(a, b)
    if html:
        _written(write_difference_page(html, told))
    if as_json:
        print(json.dumps(told, indent=2))
    elif not html:
        render_difference(told, out)


def _written(page: Path) -> None:
    err.print(f"Open {page}", markup=False, highlight=False, soft_wrap=True)


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


@app.command()
def sql(
    dataset: DatasetArgument,
    query: Annotated[str, typer.Argument(help="A query over the tables documents, spans, shards and quarantine.")],
    version: Version = None,
    form: Annotated[str, typer.Option("--format", help="table, json (one object a line) or csv.")] = "table",
    limit: Annotated[int, typer.Option(min=1, help="The most rows of a table; json and csv have all.")] = 100,
) -> None:
    """Ask any question of a dataset version in SQL (DuckDB): braid sql data "select count(*) from documents".

    Tables: documents (columns row_id, content_hash, source, token_ids, modality_ids, spans, num_tokens, num_text, num_image,
    num_audio), spans (row_id, source, modality, start, length, rows, columns, uri), shards (name, path, bytes, documents),
    quarantine (source, position, reason, error).
    """
    from pipelines.shards.dataset import Dataset
    from pipelines.sql import FORMATS, ask

    if form not in FORMATS:
        raise typer.BadParameter(f"{form} is none of {', '.join(FORMATS)}", param_hint="--format")
    FORMATS[form](ask(Dataset.open(dataset, version), query), out, limit)
