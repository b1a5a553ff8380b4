"""`braid stats --diff` in a terminal and as a page: the figures of `compare`.

Enters: what `compare` gives. Leaves: tables on a console, or one HTML file with everything inside. Always holds: bars are A,
the outline over them is B, and every change is a number too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report.charts import short
from pipelines.report.frame import Section, write_document
from pipelines.report.histogram import bar_chart
from pipelines.report.markup import Markup, table, tag
from pipelines.report.parts import section
from pipelines.report.stats_page import panel, size
from pipelines.report.terminal import right_aligned

_CHARTS = {
    "document_tokens": ("Tokens of a document", "tokens", ""),
    "text_span": ("Pieces of a text", "pieces", "text"),
    "image_span": ("Codes of a picture", "codes", "image"),
    "audio_span": ("Codes of a sound", "codes", "audio"),
}


def change(a: float, b: float) -> str:
    """How B differs from A, as a share of A where there is one."""
    if a == b:
        return "="
    return f"{(b - a) / a:+.1%}" if a else "new"


def side_name(side: dict[str, Any]) -> str:
    return f"{Path(side['dataset']).name} v{side['version']}"


def render_difference(told: dict[str, Any], console: Console) -> None:
    """Print what differs."""
    for key in ("a", "b"):
        line = f"[bold]{key.upper()}[/]  {escape(told[key]['dataset'])}, version {told[key]['version']}"
        console.print(line, highlight=False, soft_wrap=True)
    for line in _vocabulary(told):
        console.print(f"[yellow]![/] {escape(line)}", highlight=False, soft_wrap=True)
    tables = (_figure_table, _source_table, _codebook_table, _length_table, _piece_table, _quarantine_table)
    for rows in (make(told) for make in tables):
        if rows.row_count:
            console.print(rows)
    console.print(_shared(told), highlight=False)


def _vocabulary(told: dict[str, Any]) -> list[str]:
    if not told["vocabulary"]:
        return []
    return [f"The vocabularies differ in {', '.join(told['vocabulary'])} (A, B): no model reads both."]


def _shared(told: dict[str, Any]) -> str:
    shards = told["shards"]
    return (
        f"{shards['both']:,} shards are in both, {shards['a']:,} in A alone, {shards['b']:,} in B alone. About "
        f"{told['common_documents']:,} documents have a content that is in both (an estimate)."
    )


def _figure_table(told: dict[str, Any]) -> Table:
    rows = right_aligned("", "A", "B", "change")
    for entry in told["figures"]:
        rows.add_row(entry["name"], f"{entry['a']:,}", f"{entry['b']:,}", change(entry["a"], entry["b"]))
    return rows


def _source_table(told: dict[str, Any]) -> Table:
    rows = right_aligned("source", "documents A", "B", "change", "tokens A", "B", "change")
    for name, source in told["sources"].items():
        cells = []
        for key in ("documents", "tokens"):
            a, b = source["a"][key], source["b"][key]
            cells += [f"{a:,}", f"{b:,}", change(a, b)]
        rows.add_row(name, *cells)
    return rows


def _codebook_rows(told: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, book in told["codebooks"].items():
        cells = [name]
        for key in ("a", "b"):
            side = book[key]
            cells += [f"{side['used'] / max(side['size'], 1):.1%}", f"{side['perplexity']:,.1f}"] if side else ["", ""]
        divergence = book["divergence_bits"]
        rows.append((*cells, "" if divergence is None else f"{divergence:.4f}"))
    return rows


_CODEBOOK_HEADER = ("codebook", "used A", "perplexity A", "used B", "perplexity B", "divergence (bits)")


def _codebook_table(told: dict[str, Any]) -> Table:
    rows = right_aligned(*_CODEBOOK_HEADER)
    for row in _codebook_rows(told):
        rows.add_row(*row)
    return rows


def _length_table(told: dict[str, Any]) -> Table:
    rows = right_aligned("lengths", "distance of the distributions")
    for name, entry in told["lengths"].items():
        rows.add_row(_CHARTS[name][0], f"{entry['distance']:.4f}")
    return rows


def _piece_rows(told: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (
            entry["piece"] if entry["piece"] is not None else f"id {entry['id']}",
            f"{entry['a']:.3%}",
            f"{entry['b']:.3%}",
            f"{(entry['b'] - entry['a']) * 100:+.3f}",
        )
        for entry in told["pieces"]
    ]


def _piece_table(told: dict[str, Any]) -> Table:
    rows = right_aligned("text piece", "share A", "share B", "points")
    for name, *cells in _piece_rows(told)[:8]:
        rows.add_row(escape(name), *cells)
    return rows


def _quarantine_table(told: dict[str, Any]) -> Table:
    rows = right_aligned("quarantine", "A", "B")
    for reason, counts in told["quarantine"].items():
        rows.add_row(escape(reason), f"{counts['a']:,}", f"{counts['b']:,}")
    return rows


def write_difference_page(out: Path, told: dict[str, Any], title: str | None = None) -> Path:
    """Write the page; `out` is returned."""
    a, b = told["a"], told["b"]
    subtitle = f"A: {a['dataset']}, version {a['version']} · B: {b['dataset']}, version {b['version']}"
    sections = [_overview(told), _by_source(told), *_lengths(told), _ids(told)]
    if told["quarantine"]:
        rows = [
            (reason, f"{c['a']:,}", f"{c['b']:,}", change(c["a"], c["b"])) for reason, c in told["quarantine"].items()
        ]
        sections.append(
            section("quarantine", "Left out", table("In quarantine, by reason", ("reason", "A", "B", "change"), rows))
        )
    name = title or f"{side_name(a)} and {side_name(b)}"
    return write_document(out, name, subtitle, sections, styles="stats.css")


def _overview(told: dict[str, Any]) -> Section:
    def written(name: str, value: int) -> str:
        return size(value) if "bytes" in name else f"{value:,}"

    rows = [
        (e["name"], written(e["name"], e["a"]), written(e["name"], e["b"]), _change(e["a"], e["b"]))
        for e in told["figures"]
    ]
    warnings = [tag("li", line) for line in _vocabulary(told)]
    return section(
        "overview",
        "Side by side",
        tag("ul", *warnings, class_="remarks") if warnings else None,
        table("Figures of both", ("", "A", "B", "change"), rows),
        tag("p", _shared(told), class_="note"),
    )


def _change(a: float, b: float) -> Markup:
    return tag("span", change(a, b), class_="same" if a == b else "changed")


def _by_source(told: dict[str, Any]) -> Section:
    rows = [
        (
            name,
            f"{s['a']['documents']:,}",
            f"{s['b']['documents']:,}",
            _change(s["a"]["documents"], s["b"]["documents"]),
            short(s["a"]["tokens"]),
            short(s["b"]["tokens"]),
            _change(s["a"]["tokens"], s["b"]["tokens"]),
        )
        for name, s in told["sources"].items()
    ]
    header = ("source", "documents A", "B", "change", "tokens A", "B", "change")
    return section("sources", "Sources", table("Documents and tokens by source", header, rows))


def _lengths(told: dict[str, Any]) -> list[Section]:
    charts = []
    for name, entry in told["lengths"].items():
        title, unit, tone = _CHARTS[name]
        if len(entry["a"]) < 2:
            continue
        note = f"distance {entry['distance']:.3f}"
        said = f"Bars: A. Outline: B. {note} of 1 (Kolmogorov-Smirnov)."
        shares = [_of_ten_thousand(bins) for bins in (entry["a"], entry["b"])]
        drawn = bar_chart(f"{name.replace('_', '-')}-both", title, said, shares[0], other=shares[1], x_label=unit,
                          y_label="per 10,000", tone=tone)  # fmt: skip
        charts.append(panel(title, note, drawn))
    if not charts:
        return []
    legend = (
        "Bars are A, the outline is B, each per 10,000 of its own side. The distance is Kolmogorov-Smirnov's: 0 where the "
        "distributions are alike, 1 where they do not touch."
    )
    return [section("lengths", "Lengths", tag("p", legend, class_="note"), tag("div", *charts, class_="charts"))]


def _of_ten_thousand(bins: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """So that a side of many documents does not hide one of few."""
    total = sum(count for *_, count in bins)
    return [(low, high, round(10_000 * count / total)) for low, high, count in bins]


def _ids(told: dict[str, Any]) -> Section:
    books = [(tag("span", row[0], class_=f"key {row[0].split()[0]}"), *row[1:]) for row in _codebook_rows(told)]
    pieces = [(tag("code", name), *cells) for name, *cells in _piece_rows(told)]
    note = (
        "The divergence is Jensen-Shannon's, in bits: 0 where ids are used alike, 1 where no id is used by both; it is given "
        "where both sides have the same tokenizer."
    )
    return section(
        "ids",
        "Vocabulary and codebooks",
        table("Use of the text pieces and the codebooks", _CODEBOOK_HEADER, books),
        tag("p", note, class_="note"),
        table("Text pieces whose share changed most", ("piece", "share A", "share B", "points"), pieces)
        if pieces
        else None,
    )
