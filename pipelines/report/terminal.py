"""`braid stats` in a terminal: the figures of `summarize` as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report.charts import short
from pipelines.report.histogram import spark
from pipelines.report.summary import QUANTILES
from pipelines.shards.statistics import MODALITIES

_TOP_PIECES = 12

_WIDE = 110
"""Columns of a terminal in which histograms fit beside the figures."""


def render(figures: dict[str, Any], console: Console) -> None:
    """Print the figures."""
    once = ", each of which training reads once" if figures["duplicates"] == "drop" else ""
    console.print(f"[bold]{escape(figures['dataset'])}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"version {figures['version']}, fingerprint {figures['fingerprint']}\n"
        f"{figures['documents']:,} documents (about {figures['distinct_documents']:,} of distinct content{once}) "
        f"in {figures['shards']:,} shards, {figures['bytes'] / 1e6:,.1f} MB",
        highlight=False,
        soft_wrap=True,
    )
    for remark in figures["remarks"]:
        console.print(f"[yellow]![/] {escape(remark)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(_overview(figures))
    console.print(_lengths(figures, histograms=console.width >= _WIDE))
    for make in (_sources, _codebooks, _pieces, _shards, _padding, _growth, _quarantine):
        if table := make(figures):
            console.print(table)
    console.print("The tokens that open a media span count as text.", style="dim")
    if not figures["quarantine"]:
        console.print("Nothing is in quarantine.")


def right_aligned(first: str, *others: str) -> Table:
    """A table whose first column names the rows, and whose others are numbers."""
    table = Table(first, *others)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _overview(figures: dict[str, Any]) -> Table:
    table = right_aligned("", "tokens", "share", "spans", "raw MB")
    total = max(figures["tokens"]["total"], 1)
    for modality in MODALITIES:
        tokens = figures["tokens"][modality]
        spans, raw = figures["spans"][modality]["count"], figures["raw_bytes"][modality]
        table.add_row(modality, f"{tokens:,}", f"{tokens / total:.1%}", f"{spans:,}", f"{raw / 1e6:,.1f}")
    table.add_section()
    spans = sum(figures["spans"][modality]["count"] for modality in MODALITIES)
    raw = figures["raw_bytes"]
    table.add_row("all", f"{figures['tokens']['total']:,}", "", f"{spans:,}", f"{raw['total'] / 1e6:,.1f}")
    if raw["documents"] < figures["documents"]:
        table.caption = f"Raw bytes are known of {raw['documents']:,} documents."
    return table


def _lengths(figures: dict[str, Any], histograms: bool) -> Table:
    table = right_aligned("length", *(_quantile_name(q) for q in QUANTILES))
    if histograms:
        table.add_column("histogram", no_wrap=True)

    def add(name: str, quantiles: Iterable[int], bins: str) -> None:
        bars = [spark(figures["histograms"][bins])] if histograms else []
        table.add_row(name, *(f"{v:,}" if v < 1e5 else short(v) for v in quantiles), *bars)

    for modality in MODALITIES:
        if figures["spans"][modality]["count"]:
            add(f"{modality} span", figures["spans"][modality]["length"].values(), f"{modality}_span")
    add("document", figures["document_tokens"].values(), "document_tokens")
    add("its spans", figures["spans_per_document"].values(), "spans_per_document")
    table.caption = "Of spans in codes, of documents in tokens, and how many spans a document has."
    return table


def _quantile_name(q: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{q:.0%}")


def _sources(figures: dict[str, Any]) -> Table:
    table = right_aligned("source", "docs", *MODALITIES, "raw MB", "rejected", "dropped")
    reasons = []
    for name, source in figures["sources"].items():
        raw, dropped = source["raw_bytes"], source["dropped"]
        table.add_row(
            name,
            f"{source['documents']:,}",
            *(short(source["tokens"][m]) for m in MODALITIES),
            f"{raw['total'] / 1e6:,.1f}" if raw["documents"] else "?",
            f"{sum(source['rejected'].values()):,}",
            f"{sum(dropped.values()):,}",
        )
        reasons += [f"{count:,} of {name} for {reason}" for reason, count in sorted(dropped.items())]
    if reasons:
        table.caption = escape("Dropped by filters: " + ", ".join(reasons))
    return table


def _codebooks(figures: dict[str, Any]) -> Table:
    table = right_aligned("codebook", "size", "used", "dead", "entropy (bits)", "perplexity")
    for name, book in figures["codebooks"].items():
        table.add_row(
            name,
            f"{book['size']:,}",
            f"{book['used'] / max(book['size'], 1):.1%}",
            f"{book['size'] - book['used']:,}",
            f"{book['entropy_bits']:.2f}",
            f"{book['perplexity']:,.1f}",
        )
    return table


def _pieces(figures: dict[str, Any]) -> Table | None:
    pieces = figures["text_pieces"]
    if not pieces["top"]:
        return None
    covering = pieces["covering"]
    table = right_aligned("text pieces", "in use", *(f"cover {float(share):.0%}" for share in covering), "single bytes")
    bytes_share = "?" if pieces["byte_share"] is None else f"{pieces['byte_share']:.1%}"
    table.add_row(f"of {pieces['size']:,}", f"{pieces['used']:,}", *(f"{n:,}" for n in covering.values()), bytes_share)
    named = (f"{entry['piece'] or entry['id']} {short(entry['count'])}" for entry in pieces["top"][:_TOP_PIECES])
    table.caption = escape("Most frequent: " + "  ".join(named))
    return table


def _shards(figures: dict[str, Any]) -> Table | None:
    if not figures["shards"]:
        return None
    table = right_aligned("of a shard", *(_quantile_name(q) for q in QUANTILES), "largest / mean")
    sizes = figures["shard_sizes"]
    skew = f"{sizes['largest_by_mean']:.2f}"
    table.add_row("MB", *(f"{v / 1e6:,.2f}" for v in sizes["bytes"].values()), skew)
    table.add_row("documents", *(f"{v:,}" for v in sizes["rows"].values()), "")
    return table


def _padding(figures: dict[str, Any]) -> Table | None:
    if not figures["padding"]:
        return None
    table = right_aligned("sequence length", "documents cut", "padding, one a sequence", "padding, packed")
    for entry in figures["padding"]:
        style = "bold" if entry["sequence_length"] == figures["sequence_length"] else ""
        shares = (f"{entry[name]:.1%}" for name in ("cut", "separate", "packed"))
        table.add_row(f"{entry['sequence_length']:,}", *shares, style=style)
    return table


def _growth(figures: dict[str, Any]) -> Table | None:
    if len(figures["growth"]) < 2:
        return None
    first, last = figures["growth"][0], figures["growth"][-1]
    table = right_aligned("growth", "documents", *MODALITIES)
    for entry in (first, last):
        tokens = (f"{entry['tokens'][m]:,}" for m in MODALITIES)
        table.add_row(f"version {entry['version']}", f"{entry['documents']:,}", *tokens)
    return table


def _quarantine(figures: dict[str, Any]) -> Table | None:
    if not figures["quarantine"]:
        return None
    table = right_aligned("quarantine", "documents")
    for reason, count in figures["quarantine"].items():
        table.add_row(reason, f"{count:,}")
    return table
