"""What `braid stats` says of a dataset version: figures from the roll-up, as plain data and as a terminal table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.shards.dataset import Dataset
from pipelines.shards.statistics import MODALITIES, Statistics, entropy_bits, quantile

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def summarize(dataset: Dataset) -> dict[str, Any]:
    """The figures of a dataset version as JSON values.

    Keys: `dataset`, `version`, `fingerprint`, `tokenizers` (the sha256 of each), `shards`, `bytes`, `documents`,
    `distinct_documents` (HyperLogLog, 1.6% standard error), `duplicates` ("drop" where training reads each content once,
    else "keep"), `tokens` {text, image, audio, total}, `document_tokens` and `spans` {modality: {count, length}} with
    quantiles (nearest rank; exact below 4,096, within 0.025% above), `sources`, `codebooks` (per codebook: size, codes
    used, entropy in bits, perplexity), `quarantine` {reason: count}.
    """
    statistics = dataset.statistics()
    shards = dataset.shards()
    tokens = {modality: statistics.tokens(modality) for modality in MODALITIES}
    return {
        "dataset": dataset.uri,
        "version": dataset.version,
        "fingerprint": dataset.vocabulary.fingerprint,
        "tokenizers": {
            name: getattr(dataset.vocabulary, name) for name in ("text_sha256", "image_sha256", "audio_sha256")
        },
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "documents": statistics.documents,
        "distinct_documents": statistics.distinct_documents,
        "duplicates": dataset.duplicates,
        "tokens": tokens | {"total": sum(tokens.values())},
        "document_tokens": _quantiles(statistics.lengths),
        "spans": {
            modality: {"count": sum(counts.values()), "length": _quantiles(counts)}
            for modality, counts in statistics.span_lengths.items()
        },
        "sources": {
            name: {"documents": source.documents, "tokens": dict(source.tokens), "dropped": dict(source.dropped)}
            for name, source in sorted(statistics.sources.items())
        },
        "codebooks": _codebooks(statistics, dataset),
        "quarantine": dict(Counter(row["reason"] for row in dataset.quarantined()).most_common()),
    }


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    return {f"{q:g}": quantile(counts, q) for q in QUANTILES}


def _codebooks(statistics: Statistics, dataset: Dataset) -> dict[str, dict[str, Any]]:
    pieces = statistics.text_counts[: dataset.vocabulary.text_pieces]
    codebooks: dict[str, NDArray[np.int64]] = {"text pieces": pieces}
    if len(statistics.image_counts):
        codebooks["image"] = statistics.image_counts
    for index, counts in enumerate(statistics.audio_counts):
        codebooks[f"audio {index}"] = counts
    return {
        name: {
            "size": len(counts),
            "used": int(np.count_nonzero(counts)),
            "entropy_bits": round(entropy_bits(counts), 3),
            "perplexity": round(2 ** entropy_bits(counts), 1),
        }
        for name, counts in codebooks.items()
    }


def render(figures: dict[str, Any], console: Console) -> None:
    """Print the figures of `summarize` as tables."""
    once = ", each of which training reads once" if figures["duplicates"] == "drop" else ""
    console.print(f"[bold]{escape(figures['dataset'])}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"version {figures['version']}, fingerprint {figures['fingerprint']}\n"
        f"{figures['documents']:,} documents (about {figures['distinct_documents']:,} of distinct content{once}) "
        f"in {figures['shards']:,} shards, {figures['bytes'] / 1e6:,.1f} MB\n",
        highlight=False,
        soft_wrap=True,
    )
    for table in (_overview(figures), _lengths(figures), _sources(figures), _codebook_table(figures)):
        console.print(table)
    console.print("The tokens that open a media span count as text.", style="dim")
    if figures["quarantine"]:
        table = Table("quarantine", "documents", title_justify="left")
        for reason, count in figures["quarantine"].items():
            table.add_row(reason, f"{count:,}")
        console.print(table)
    else:
        console.print("Nothing is in quarantine.")


def _overview(figures: dict[str, Any]) -> Table:
    table = Table("", "tokens", "share", "spans")
    for column in table.columns[1:]:
        column.justify = "right"
    total = max(figures["tokens"]["total"], 1)
    for modality in MODALITIES:
        tokens = figures["tokens"][modality]
        table.add_row(modality, f"{tokens:,}", f"{tokens / total:.1%}", f"{figures['spans'][modality]['count']:,}")
    table.add_section()
    spans = sum(figures["spans"][modality]["count"] for modality in MODALITIES)
    table.add_row("all", f"{figures['tokens']['total']:,}", "", f"{spans:,}")
    return table


def _lengths(figures: dict[str, Any]) -> Table:
    table = Table("tokens of a", *(_quantile_name(q) for q in QUANTILES))
    for column in table.columns[1:]:
        column.justify = "right"
    for modality in MODALITIES:
        span = figures["spans"][modality]
        if span["count"]:
            table.add_row(f"{modality} span", *(f"{v:,}" for v in span["length"].values()))
    table.add_row("document", *(f"{v:,}" for v in figures["document_tokens"].values()))
    return table


def _quantile_name(q: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(q, f"{q:.0%}")


def _sources(figures: dict[str, Any]) -> Table:
    table = Table("source", "documents", *MODALITIES, "dropped by filters")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, source in figures["sources"].items():
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(source["dropped"].items()))
        table.add_row(name, f"{source['documents']:,}", *(f"{source['tokens'][m]:,}" for m in MODALITIES), dropped)
    return table


def _codebook_table(figures: dict[str, Any]) -> Table:
    table = Table("codebook", "size", "used", "dead", "entropy (bits)", "perplexity")
    for column in table.columns[1:]:
        column.justify = "right"
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
