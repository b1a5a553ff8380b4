"""`braid evaluate --html`: the figures of an evaluation as charts and tables, and what the model made, to see and hear.

Enters: an `Evaluation`. Leaves: one HTML file that opens by double click. Always holds: the figures are those of the JSON,
each beside its baseline; the page asks nothing of any network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.decode import DecodedSpan
from pipelines.evaluate.evaluation import Evaluation
from pipelines.evaluate.generation import Shown
from pipelines.evaluate.terminal import NAMES, UNITS, interval, rows_of
from pipelines.report.charts import Line, line_chart, short
from pipelines.report.frame import Section, write_document
from pipelines.report.histogram import bar_chart
from pipelines.report.intervals import Estimate, interval_chart
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.media import prose
from pipelines.report.parts import key_figures, section
from pipelines.report.samples import picture, player
from pipelines.report.stats_page import panel

_POSITIONS = {
    "text": ("pieces", "Texts, by piece"),
    "image": ("codes", "Pictures, by code in raster order"),
    "audio": ("frames", "Sounds, by frame"),
}


def write_evaluation_page(out: Path, evaluation: Evaluation, *, title: str | None = None) -> Path:
    """Write the page.

    Args:
        title: by default the checkpoint's name.

    Returns:
        `out`.
    """
    figures = evaluation.figures
    sections = [
        _overview(figures),
        _calibration(figures),
        _positions(figures),
        *([_gain(figures)] if figures["gain"] else []),
        *([_generation(figures, evaluation.shown)] if figures["generation"] else []),
        _provenance(figures),
    ]
    dataset = figures["dataset"]
    subtitle = f"evaluated on {figures['documents']:,} documents, {figures['split']} split of {dataset['uri']}"
    name = title or Path(figures["checkpoint"]["path"]).resolve().name
    return write_document(out, name, f"{subtitle}, version {dataset['version']}", sections, styles="stats.css")


def _overview(figures: dict[str, Any]) -> Section:
    checkpoint = figures["checkpoint"]
    told = [(short(float(f"{checkpoint['parameters']:.3g}")), "parameters")]
    for modality in figures["modalities"].values():
        if modality and modality["bits"]:
            bits = modality["bits"]
            what = {"byte": "bits a byte of text", "image": "bits a picture", "second": "bits a second of sound"}
            told.append(
                (f"{bits['value']:,.2f}", f"{what[bits['per']]} (by token frequencies alone: {bits['unigram']:,.2f})")
            )
    rows = []
    for name, one in rows_of(figures):
        unigram = one["unigram"]
        tone, _, codebook = name.partition("/")
        label = tag("span", f"cb {codebook}" if codebook else name, class_=f"key {tone}{' sub' * bool(codebook)}")
        rows.append(
            (
                label,
                f"{one['targets']:,}",
                f"{one['loss']:.3f}",
                interval(one.get("loss_interval")),
                f"{unigram['loss']:.3f}",
                short(float(f"{one['perplexity']:.4g}")),
                _percent(one["accuracy"]["1"], unigram["accuracy"]["1"]),
                _percent(one["accuracy"]["5"], unigram["accuracy"]["5"]),
                f"{one['calibration_error']:.3f}",
            )
        )
    header = (
        "",
        "targets",
        "loss",
        "95%",
        "unigram",
        "perplexity",
        "first (unigram)",
        "of 5 (unigram)",
        "calibration error",
    )
    bits = [
        (
            tag("span", UNITS[one["bits"]["per"]], class_=f"key {name}"),
            f"{one['bits']['value']:,.3f}",
            interval(one["bits"]["interval"], ",.3f"),
            f"{one['bits']['unigram']:,.3f}",
            f"{one['bits']['units']:,.0f}",
        )
        for name, one in figures["modalities"].items()
        if one and one["bits"]
    ]
    remarks = figures["remarks"]
    return section(
        "overview",
        "Overview",
        key_figures(*told),
        table("Loss in nats a token, and how often the target was among the likeliest tokens", header, rows),
        table("Bits", ("for", "model", "95%", "unigram", "counted"), bits) if bits else None,
        tag(
            "p",
            "Intervals are 95% bootstraps over documents. The unigram knows how often each token occurs in all other "
            "documents of the dataset, and nothing else. Special tokens count as text, but not in the bits.",
            class_="note",
        ),
        tag("ul", *(tag("li", remark) for remark in remarks), class_="remarks") if remarks else None,
    )


def _percent(value: float, baseline: float) -> str:
    return f"{value:.1%} ({baseline:.1%})"


def _calibration(figures: dict[str, Any]) -> Section:
    charts: list[Markup] = []
    tables: list[Markup] = []
    for name, bins in figures["reliability"].items():
        if not bins:
            continue
        error = figures["modalities"][name]["calibration_error"]
        points = [(100 * b["confidence"], 100 * b["accuracy"]) for b in bins]
        top = points[-1][0]
        lines = [
            Line(name="as sure as right", points=[(0.0, 0.0), (top, top)], style="reference", label="ideal"),
            Line(name=name, points=points, style=name, label=name, markers=True),
        ]
        said = f"Mean distance of confidence and accuracy {error:.3f}."
        drawn = line_chart(f"reliability-{name}", f"Reliability of {name}", said, lines, y_label="% right", x_label="% sure",
                           tone=name, from_zero=True)  # fmt: skip
        charts.append(panel(name.capitalize(), f"expected calibration error {error:.3f}", drawn))
        rows = [
            (
                f"{b['low']:.0%} to {b['high']:.0%}",
                f"{b['targets']:,}",
                f"{b['confidence']:.1%}",
                f"{b['accuracy']:.1%}",
            )
            for b in bins
        ]
        tables.append(table(f"Reliability of {name}", ("confidence", "targets", "mean", "right"), rows))
    return section(
        "calibration",
        "Calibration",
        tag(
            "p",
            "Of the tokens that the model was so sure of, how many were right; above the line it is too modest.",
            class_="note",
        ),
        tag("div", *charts, class_="charts"),
        tag("details", tag("summary", "The bins"), *tables),
    )


def _positions(figures: dict[str, Any]) -> Section:
    charts = []
    for name, bins in figures["positions"].items():
        if len(bins) < 2:
            continue
        unit, title = _POSITIONS[name]
        model = [(b["low"], b["high"], round(b["loss"], 3)) for b in bins]
        unigram = [(b["low"], b["high"], round(b["unigram"], 3)) for b in bins]
        note = f"{bins[0]['loss']:.2f} at the beginning, {bins[-1]['loss']:.2f} at the end"
        drawn = bar_chart(f"positions-{name}", title, f"{note}.", model, x_label=unit, y_label="nats a token", tone=name,
                          other=unigram)  # fmt: skip
        charts.append(panel(title, note, drawn))
    return section(
        "positions",
        "Loss by position",
        tag("p", "Where in its span a token stands. Outline: the unigram on the same tokens.", class_="note"),
        tag("div", *charts, class_="charts"),
    )


def _gain(figures: dict[str, Any]) -> Section:
    rows, shuffled, without = [], [], []
    for entry in figures["gain"]:
        name = f"{entry['given']} → {entry['predicted']}"
        loss = entry["loss"]
        over, alone = entry["gain"]["over_shuffled"], entry["gain"]["over_without"]
        tone = entry["predicted"]
        shuffled.append(Estimate(name=name, value=over["nats"], interval=over["interval"], tone=tone))
        without.append(Estimate(name=name, value=alone["nats"], interval=alone["interval"], tone=tone))
        rows.append(
            (
                tag("span", name, class_=f"key {tone}"),
                f"{entry['documents']:,}",
                *(f"{loss[key]:.3f}" for key in ("own", "shuffled", "without", "unigram")),
                f"{over['nats']:+.3f}",
                interval(over["interval"], "+.3f"),
                f"{over['documents_helped']:.0%}",
            )
        )
    said = "; ".join(f"{e.name} {e.value:+.3f}" for e in shuffled)
    charts = [
        panel("Against another document's", "nats a token, 95% intervals",
              interval_chart("gain-shuffled", "Gain over a shuffled partner", f"{said}.", shuffled, x_label="nats a token")),
        panel("Against none", "the document then begins as in training it may never have",
              interval_chart("gain-without", "Gain over no partner", "The same, against no partner.", without,
                             x_label="nats a token")),
    ]  # fmt: skip
    header = ("given → predicted", "pairs", "own", "shuffled", "without", "unigram", "gain", "95%", "helped")
    return section(
        "gain",
        "Cross-modal gain",
        tag(
            "p",
            "How much lower the loss of the second span is behind the first one of its own document. What lies right of 0 "
            "with its whole interval is beyond chance.",
            class_="note",
        ),
        tag("div", *charts, class_="charts"),
        table("Loss in nats a token, by what stands before the span", header, rows),
    )


def _generation(figures: dict[str, Any], shown: list[Shown]) -> Section:
    parts: list[Markup] = []
    for entry in figures["generation"]:
        title = f"{entry['given'].capitalize()} to {entry['predicted']}"
        rows = [
            (
                name,
                f"{entry[key]['own']:.3f}",
                interval(entry[key]["interval"]),
                _number(entry[key]["shuffled"]),
                _number(entry[key]["reconstruction"]),
            )
            for key, name in NAMES.items()
            if key in entry
        ]
        nearest = [
            (
                f"by {space}",
                f"{told['own']:.0%}",
                interval(told["interval"], ".0%"),
                "?" if told["shuffled"] is None else f"{told['shuffled']:.0%}",
                f"{told['chance']:.0%}",
            )
            for space, told in entry["nearest"].items()
        ]
        made = [
            one
            for one in shown
            if (one.direction[0].label, one.direction[1].label) == (entry["given"], entry["predicted"])
        ]
        parts.append(
            join(
                [
                    tag("h3", title),
                    table(
                        f"{title}: distance to the reference", ("", "own", "95%", "shuffled", "tokenizer alone"), rows
                    ),
                    table(
                        f"{title}: its own reference is the nearest", ("", "own", "95%", "shuffled", "chance"), nearest
                    ),
                    tag("div", *map(_card, made), class_="cards samples"),
                ]
            )
        )
    return section(
        "generation",
        "What it makes",
        tag(
            "p",
            "Shuffled: against the reference of another document. Tokenizer alone: what the reference itself loses when it "
            "goes through the tokenizer and back, which no model can better.",
            class_="note",
        ),
        *parts,
    )


def _card(shown: Shown) -> Markup:
    about = (shown.given.text or shown.generated.text or f"row {shown.number}")[:120]
    given = shown.given
    parts: list[Markup | None] = []
    if given.text is not None:
        parts.append(tag("div", prose(given.text), class_="given"))
    elif given.pixels is not None:
        parts.append(tag("div", picture(given.pixels, "given", f"Given picture of: {about}"), class_="pair one"))
    else:
        parts.append(player(given, "given", f"Given sound of: {about}"))
    named = [
        ("original", shown.original),
        ("reconstruction" if shown.original else "reference", shown.reconstruction),
        ("generated", shown.generated),
    ]
    there = [(name, span) for name, span in named if span is not None]
    if shown.generated.pixels is not None:
        figures = [_picture(name, span, about) for name, span in there]
        parts.append(tag("div", *figures, class_="pair three"))
    elif shown.generated.text is not None:
        texts = [("reference", shown.reconstruction), ("generated", shown.generated)]
        parts += [tag("div", tag("span", name, class_="side"), prose(_words(span))) for name, span in texts]
    else:
        parts += [player(span, name, f"{name.capitalize()} sound of: {about}") for name, span in there]
    told = ", ".join(f"{name} {value:.3f}" for name, value in shown.told.items())
    return tag("article", *parts, tag("footer", f"row {shown.number:,} · {told}"), class_="card")


def _picture(name: str, span: DecodedSpan, about: str) -> Markup:
    assert span.pixels is not None
    return picture(span.pixels, name, f"{name.capitalize()} picture of: {about}")


def _words(span: DecodedSpan) -> str:
    return " ".join((span.text or "").split()) or "(nothing but white space)"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _provenance(figures: dict[str, Any]) -> Section:
    checkpoint = figures["checkpoint"]
    facts = {
        "checkpoint": checkpoint["path"],
        "step": _count(checkpoint["step"]),
        "tokens trained on, padding included": _count(checkpoint["tokens"]),
        "context": f"{checkpoint['context']:,} tokens",
        "computed in": f"{checkpoint['precision']} on {checkpoint['device']}",
        "fingerprint of the vocabulary": checkpoint["fingerprint"],
        "dataset": f"{figures['dataset']['uri']}, version {figures['dataset']['version']}",
        "documents": f"{figures['documents']:,} of {figures['tokens']:,} tokens, {figures['split']} split"
        + (f", limited to {figures['limit']:,}" if figures["limit"] else ""),
        "seed": str(figures["seed"]),
    }
    if figures["sampling"]:
        facts["sampling of pictures and sounds"] = ", ".join(
            f"{name.replace('_', '-')} {value:g}" for name, value in figures["sampling"].items() if value is not None
        )
    listed = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    return section("made", "How it was measured", tag("dl", *listed, class_="facts"))


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
