"""`braid stats --html`: everything that is known of a dataset version on one page.

Enters: a dataset. Leaves: one HTML file that opens by double click. Always holds: the figures are those of `summarize`; of
the shards only those are opened whose rows are shown; the page asks nothing of any network.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.originals import Original, find_originals
from pipelines.report.charts import Line, line_chart, share_bar, short
from pipelines.report.frame import Section, write_document
from pipelines.report.histogram import bar_chart
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.parts import coverage_chart, key_figures, section
from pipelines.report.pieces import names
from pipelines.report.samples import cards
from pipelines.report.summary import QUANTILES, code_counts, figures_of
from pipelines.rows import rows_at, spread
from pipelines.shards.dataset import Dataset
from pipelines.shards.statistics import MODALITIES, Statistics
from pipelines.show import ShownRow, dataset_tokenizers, show

SAMPLES = 48
ORIGINALS_S = 30.0
"""How long originals are looked for."""


def write_stats_page(out: Path, dataset: Dataset, *, samples: int = SAMPLES, title: str | None = None) -> Path:
    """Write the page of a dataset version.

    Args:
        samples: rows to decode, spread evenly over the dataset; 0 needs no tokenizers.

    Returns:
        `out`.

    Raises:
        DatasetError, VocabularyError, CheckpointError: there are samples, but the tokenizers cannot be opened.
    """
    statistics = dataset.statistics()
    figures = figures_of(dataset, statistics, names(dataset))
    rows: list[ShownRow] = []
    originals: list[Original] = []
    if samples and figures["documents"]:
        stored = list(rows_at(dataset, spread(dataset, samples)))
        tokenizers = dataset_tokenizers(dataset)
        rows = list(show(dataset, stored, tokenizers=tokenizers))
        originals = find_originals(dataset, stored, tokenizers, timeout_s=ORIGINALS_S)
    sections = [
        _overview(figures),
        _sources(figures),
        _lengths(figures),
        _codebooks(figures, statistics, dataset.vocabulary.text_pieces),
        _shards(figures),
        *([_quarantine(figures)] if figures["quarantine"] or _dropped(figures) else []),
        *([_samples(rows, originals)] if rows else []),
        _provenance(figures),
    ]
    name = title or Path(dataset.uri).name
    return write_document(
        out, name, f"token dataset {dataset.uri}, version {dataset.version}", sections, styles="stats.css"
    )


def _overview(figures: dict[str, Any]) -> Section:
    tokens, raw = figures["tokens"], figures["raw_bytes"]
    total = max(tokens["total"], 1)
    present = [m for m in MODALITIES if tokens[m]]
    copies = figures["documents"] - figures["distinct_documents"]
    once = "; training reads each content once" if figures["duplicates"] == "drop" else ""
    told = [
        (f"{figures['documents']:,}", "documents"),
        (short(float(f"{tokens['total']:.4g}")), f"tokens ({tokens['total']:,})"),
        (size(raw["total"]), "of raw texts and files" + _known(figures)),
        (size(figures["bytes"]), f"in {figures['shards']:,} shards, {figures['bytes'] / total:.2f} bytes a token"),
        (f"≈ {copies:,}", f"documents that repeat others, estimated (HyperLogLog, ± 1.6%){once}"),
        (f"{sum(figures['quarantine'].values()):,}", "in quarantine"),
    ]  # fmt: skip
    rows = [
        (
            tag("span", modality, class_=f"key {modality}"),
            f"{tokens[modality]:,}",
            f"{tokens[modality] / total:.1%}",
            f"{figures['spans'][modality]['count']:,}",
            size(raw[modality]),
            f"{raw[modality] / tokens[modality]:.2f}" if raw["documents"] == figures["documents"] else "",
        )
        for modality in present
    ]
    shares = share_bar("shares", "Share of the tokens by modality", [(m, tokens[m] / total) for m in present])
    by_modality = table("By modality", ("", "tokens", "share", "spans", "raw bytes", "raw bytes a token"), rows)
    notes = figures["remarks"]
    listed = tag("ul", *(tag("li", note) for note in notes), class_="remarks") if notes else None
    return section(
        "overview",
        "Overview",
        key_figures(*told),
        shares if present else None,
        by_modality if present else None,
        tag("p", "The tokens that open a picture or a sound count as text.", class_="note"),
        tag("h3", "Worth a look") if notes else None,
        listed,
    )


def _known(figures: dict[str, Any]) -> str:
    known, documents = figures["raw_bytes"]["documents"], figures["documents"]
    return "" if known == documents else f", known of {known:,} documents"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:,.0f} B"


def meter(share: float, text: str, tone: str = "") -> Markup:
    """A number with a bar behind it."""
    return tag("span", text, class_=f"meter {tone}", style=f"--share:{share:.4f}")


def _sources(figures: dict[str, Any]) -> Section:
    present = [m for m in MODALITIES if figures["tokens"][m]]
    total = max(figures["documents"], 1)
    rows = []
    for name, source in figures["sources"].items():
        raw = source["raw_bytes"]
        rows.append(
            (
                name,
                meter(source["documents"] / total, f"{source['documents']:,}"),
                *(
                    meter(source["tokens"][m] / max(figures["tokens"][m], 1), f"{source['tokens'][m]:,}", m)
                    for m in present
                ),
                size(raw["total"]) if raw["documents"] else "unknown",
                f"{sum(source['rejected'].values()):,}",
                f"{sum(source['dropped'].values()):,}",
            )
        )
    header = ("source", "documents", *(f"{m} tokens" for m in present), "raw bytes", "rejected", "dropped")
    caption = "Documents and tokens by source; bars show the share of all"
    return section("sources", "Sources", table(caption, header, rows))


def _lengths(figures: dict[str, Any]) -> Section:
    said = {
        "document_tokens": ("Tokens of a document", "tokens", "", figures["document_tokens"]),
        "text_span": ("Pieces of a text", "pieces", "text", figures["spans"]["text"]["length"]),
        "image_span": ("Codes of a picture", "codes", "image", figures["spans"]["image"]["length"]),
        "audio_span": ("Codes of a sound", "codes", "audio", figures["spans"]["audio"]["length"]),
        "spans_per_document": ("Spans of a document", "spans", "", figures["spans_per_document"]),
    }
    charts, rows = [], []
    for key, (title, unit, tone, quantiles) in said.items():
        bins = figures["histograms"][key]
        if not bins:
            continue
        label = tag("span", title, class_=f"key {tone}") if tone else title
        rows.append((label, *(f"{value:,}" for value in quantiles.values())))
        middle, least, most = quantiles["0.5"], quantiles["0"], quantiles["1"]
        if least == most:
            # One bar would say less than the row of the table.
            continue
        note = f"median {middle:,}, {least:,} to {most:,}"
        what = "documents" if "document" in title else "spans"
        drawn = bar_chart(key.replace("_", "-"), title, f"From {least:,} to {most:,} {unit}, median {middle:,}.", bins,
                          x_label=unit, y_label=what, tone=tone)  # fmt: skip
        charts.append(panel(title, note, drawn))
    header = ("", *({0.0: "least", 0.5: "median", 1.0: "most"}.get(q, f"{q:.0%}") for q in QUANTILES))
    return section(
        "lengths",
        "Lengths",
        tag("div", *charts, class_="charts"),
        table("Quantiles (exact below 4,096, within 0.025% above)", header, rows),
        _padding(figures),
    )


def panel(title: str, note: str, drawn: Markup | None) -> Markup:
    """A chart with its heading."""
    head = tag("figcaption", tag("strong", title), tag("span", note, class_="note") if note else None)
    return tag("figure", head, drawn, class_="panel")


def _padding(figures: dict[str, Any]) -> Markup | None:
    rows = []
    for entry in figures["padding"]:
        own = entry["sequence_length"] == figures["sequence_length"]
        name = tag("strong", f"{entry['sequence_length']:,}") if own else f"{entry['sequence_length']:,}"
        rows.append((name, f"{entry['cut']:.1%}", meter(entry["separate"], f"{entry['separate']:.1%}"),
                     meter(entry["packed"], f"{entry['packed']:.1%}")))  # fmt: skip
    if not rows:
        return None
    own = " The recipe's own length is bold." if figures["sequence_length"] else ""
    return join(
        [
            tag("h3", "Padding to expect"),
            table(
                "Share of a training batch that would be padding, estimated",
                ("sequence length", "documents cut", "one document a sequence", "packed, as the loader does"),
                rows,
            ),
            tag("p", f"Documents longer than a sequence become several pieces.{own}", class_="note"),
        ]
    )


def _codebooks(figures: dict[str, Any], statistics: Statistics, pieces: int) -> Section:
    rows = [
        (
            tag("span", name, class_=f"key {name.split()[0]}"),
            f"{book['size']:,}",
            meter(book["used"] / max(book["size"], 1), f"{book['used'] / max(book['size'], 1):.1%}", name.split()[0]),
            f"{book['size'] - book['used']:,}",
            f"{book['entropy_bits']:.2f}",
            f"{book['perplexity']:,.1f}",
        )
        for name, book in figures["codebooks"].items()
    ]
    counts = code_counts(statistics, pieces)
    groups = {
        "text": ("Text pieces", [("text", counts["text pieces"])], "pieces"),
        "image": ("Codes of pictures", [("image", counts["image"])] if "image" in counts else [], "codes"),
        "audio": ("Codes of sounds", [(n.split()[1], c) for n, c in counts.items() if n.startswith("audio")], "codes"),
    }
    charts = [
        coverage_chart(f"coverage-{tone}", title, used, tone=tone, what=what)
        for tone, (title, used, what) in groups.items()
        if used and sum(int(c.sum()) for _, c in used)
    ]
    return section(
        "codebooks",
        "Vocabulary and codebooks",
        table(
            "Use of the text pieces and the codebooks",
            ("", "size", "used", "dead", "entropy (bits)", "perplexity"),
            rows,
        ),
        tag("div", *charts, class_="charts"),
        _pieces(figures["text_pieces"]),
    )


def _pieces(pieces: dict[str, Any]) -> Markup | None:
    top = pieces["top"]
    if not top:
        return None
    most = top[0]["count"]
    chips = [
        tag("li", tag("code", entry["piece"] if entry["piece"] is not None else f"id {entry['id']}"),
            meter(entry["count"] / most, short(entry["count"]), "text"))
        for entry in top
    ]  # fmt: skip
    covering = ", ".join(f"{count:,} cover {float(share):.0%}" for share, count in pieces["covering"].items())
    foreign = pieces["byte_share"]
    said = f"{pieces['used']:,} of {pieces['size']:,} pieces occur; {covering} of the text." + (
        f" {foreign:.2%} are bytes of characters that the tokenizer does not have." if foreign else ""
    )
    lacking = pieces["missing_names"]
    return join(
        [
            tag("h3", "The most frequent text pieces"),
            tag("p", said, class_="note"),
            tag(
                "p", f"Pieces go by their ids, because the text tokenizer could not be opened: {lacking}", class_="note"
            )
            if lacking
            else None,
            tag("ol", *chips, class_="pieces"),
        ]
    )


def _shards(figures: dict[str, Any]) -> Section:
    sizes = figures["shard_sizes"]
    bins = figures["histograms"]["shard_bytes"]
    charts: list[Markup] = []
    if bins:
        least, most = sizes["bytes"]["0"], sizes["bytes"]["1"]
        note = f"{size(least)} to {size(most)}, largest {sizes['largest_by_mean']:.2f} times the mean"
        drawn = bar_chart("shard-bytes", "Sizes of shards", f"{note}.", bins, x_label="", y_label="shards", label=size)
        charts.append(panel("Sizes of shards", note, drawn))
    charts += _growth(figures["growth"])
    rows = [(tag("code", e["name"]), size(e["bytes"]), f"{e['rows']:,}") for e in sizes["largest"]]
    return section(
        "shards",
        "Shards and growth",
        tag("div", *charts, class_="charts"),
        table("The largest shards", ("file", "size", "documents"), rows) if rows else None,
    )


def _growth(entries: list[dict[str, Any]]) -> list[Markup]:
    if len(entries) < 2:
        return []
    first, last = entries[0], entries[-1]
    when = [_date(entry["time_ms"]) for entry in (first, last) if entry["time_ms"]]
    span = f", {' to '.join(dict.fromkeys(when))}" if when else ""
    note = f"versions {first['version']} to {last['version']}{span}"
    documents = Line(
        name="documents", points=[(float(e["version"]), float(e["documents"])) for e in entries], style="plain"
    )
    tokens = [
        Line(name=m, points=[(float(e["version"]), float(e["tokens"][m])) for e in entries], style=m, label=m)
        for m in MODALITIES
        if last["tokens"][m]
    ]
    said = f"From {first['documents']:,} documents to {last['documents']:,}."
    drawn = line_chart("growth-documents", "Documents by version", said, [documents], y_label="documents", x_label="version",
                       from_zero=True)  # fmt: skip
    found = [panel("Documents by version", note, drawn)]
    if tokens:
        told = ", ".join(f"{line.name} {line.points[-1][1]:,.0f}" for line in tokens)
        drawn = line_chart("growth-tokens", "Tokens by version", f"In version {last['version']}: {told}.", tokens,
                           y_label="tokens", x_label="version", from_zero=True)  # fmt: skip
        found.append(panel("Tokens by version", "by modality", drawn))
    return found


def _date(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")


def _dropped(figures: dict[str, Any]) -> list[tuple[str, str, int]]:
    return [
        (name, reason, count)
        for name, source in figures["sources"].items()
        for reason, count in sorted(source["dropped"].items(), key=lambda item: -item[1])
    ]


def _quarantine(figures: dict[str, Any]) -> Section:
    most = max(figures["quarantine"].values(), default=1)
    reasons = [(reason, meter(count / most, f"{count:,}")) for reason, count in figures["quarantine"].items()]
    dropped = [(f"{name}: {reason}", f"{count:,}") for name, reason, count in _dropped(figures)]
    return section(
        "quarantine",
        "Left out",
        table("In quarantine, by reason", ("reason", "documents"), reasons) if reasons else None,
        table("Taken out by filters of the recipe", ("source: filter", "documents"), dropped) if dropped else None,
        tag("p", tag("code", "braid quarantine list"), " names each.", class_="note") if reasons else None,
    )


def _samples(rows: list[ShownRow], originals: list[Original]) -> Section:
    there = sum(not original.missing for original in originals)
    said = (
        f"{len(rows):,} documents, spread evenly over the dataset and decoded from their tokens; of {there:,} the originals "
        "stand beside, as the tokenizers saw them. These were read again, and have the content hash of their rows."
    )
    return section("samples", "Samples", tag("p", said, class_="note"), cards(rows, originals))


def _provenance(figures: dict[str, Any]) -> Section:
    made = figures["tokenizers"]
    rows = [(key, _plain(value)) for key, value in made.items() if key != "preprocessing"]
    rows += [(f"{name} preprocessing", _plain(value)) for name, value in made["preprocessing"].items()]
    facts = [
        ("fingerprint of the vocabulary", figures["fingerprint"]),
        ("validation share", f"{figures['validation_share']:.2%}"),
        (
            "sequence length of the recipe",
            f"{figures['sequence_length']:,}" if figures["sequence_length"] else "unknown",
        ),
    ]
    listed = [tag("div", tag("dt", name), tag("dd", value)) for name, value in [*facts, *rows]]
    return section("made", "Made with", tag("dl", *listed, class_="facts"))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
