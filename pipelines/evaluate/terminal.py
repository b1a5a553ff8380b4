"""`braid evaluate` in a terminal: the figures as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.report.charts import short
from pipelines.report.terminal import right_aligned

UNITS = {"byte": "a byte", "image": "an image", "second": "a second"}
"""What bits are counted for."""


def render(figures: dict[str, Any], console: Console) -> None:
    """Print the figures."""
    checkpoint, dataset = figures["checkpoint"], figures["dataset"]
    step = f", step {checkpoint['step']:,}" if checkpoint["step"] is not None else ""
    console.print(f"[bold]{escape(checkpoint['path'])}[/]{step}", highlight=False, soft_wrap=True)
    console.print(
        f"on {figures['documents']:,} documents of {figures['tokens']:,} tokens, {figures['split']} split of "
        f"{escape(dataset['uri'])} version {dataset['version']}; {checkpoint['precision']} on {checkpoint['device']}",
        highlight=False,
        soft_wrap=True,
    )
    for remark in figures["remarks"]:
        console.print(f"[yellow]![/] {escape(remark)}", highlight=False, soft_wrap=True)
    console.print()
    for table in (_losses(figures), _bits(figures), _gain(figures), *_generation(figures)):
        if table is not None:
            console.print(table)


def interval(bounds: list[float] | None, form: str = ".3f") -> str:
    """`1.234 … 1.345`; nothing where none is known."""
    return f"{bounds[0]:{form}} … {bounds[1]:{form}}" if bounds else ""


def rows_of(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, figures) of each modality that was measured, and of each audio codebook."""
    rows = []
    for name, told in figures["modalities"].items():
        if told is not None:
            rows.append((name, told))
            rows += [(f"{name}/{q}", book) for q, book in enumerate(told.get("codebooks", ()))]
    return rows


def _losses(figures: dict[str, Any]) -> Table:
    table = right_aligned("", "loss", "95%", "perplexity", "first", "of 5", "ECE")
    for name, told in rows_of(figures):
        table.add_row(
            name,
            f"{told['loss']:.3f}",
            interval(told.get("loss_interval")),
            short(float(f"{told['perplexity']:.4g}")),
            f"{told['accuracy']['1']:.1%}",
            f"{told['accuracy']['5']:.1%}",
            f"{told['calibration_error']:.3f}",
        )
        unigram = told["unigram"]
        table.add_row(
            "  unigram",
            f"{unigram['loss']:.3f}",
            "",
            short(float(f"{unigram['perplexity']:.4g}")),
            f"{unigram['accuracy']['1']:.1%}",
            f"{unigram['accuracy']['5']:.1%}",
            f"{unigram['calibration_error']:.3f}",
            style="dim",
        )
    table.caption = (
        "Loss in nats a token. First: the target was the likeliest token; of 5: among the five likeliest. "
        "ECE: expected calibration error."
    )
    return table


def _bits(figures: dict[str, Any]) -> Table:
    table = right_aligned("bits", "model", "95%", "unigram", "counted")
    for told in figures["modalities"].values():
        if told and told["bits"]:
            bits = told["bits"]
            table.add_row(
                UNITS[bits["per"]],
                f"{bits['value']:,.3f}",
                interval(bits["interval"], ",.3f"),
                f"{bits['unigram']:,.3f}",
                f"{bits['units']:,.0f}",
            )
    return table


def _gain(figures: dict[str, Any]) -> Table | None:
    if not figures["gain"]:
        return None
    table = right_aligned("given → told", "own", "shuffled", "without", "gain", "95%")
    for entry in figures["gain"]:
        loss, over = entry["loss"], entry["gain"]["over_shuffled"]
        table.add_row(
            f"{entry['given']} → {entry['predicted']}",
            *(f"{loss[name]:.3f}" for name in ("own", "shuffled", "without")),
            f"{over['nats']:+.3f}",
            interval(over["interval"], "+.3f"),
        )
    pairs = sorted({entry["documents"] for entry in figures["gain"]})
    table.caption = (
        f"Cross-modal gain in nats a token, of {' to '.join(f'{n:,}' for n in {pairs[0]: 0, pairs[-1]: 0})} pairs: how much "
        "lower the loss of the second is behind the first of its own document than behind another's."
    )
    return table


NAMES = {
    "pixel_distance": "pixel distance, 0 to 1",
    "code_distance": "codes that differ, 0 to 1",
    "mel_distance_db": "mel distance, dB",
    "edit_distance": "edit distance, 0 to 1",
    "exact": "exact matches",
}


def _generation(figures: dict[str, Any]) -> list[Table]:
    tables = []
    for entry in figures["generation"] or []:
        title = f"{entry['given']} → {entry['predicted']}, {entry['samples']} made"
        table = right_aligned(title, "own", "95%", "shuffled", "tokenizer")
        for key, name in NAMES.items():
            if key in entry:
                told = entry[key]
                table.add_row(
                    name,
                    f"{told['own']:.3f}",
                    interval(told["interval"]),
                    _number(told["shuffled"]),
                    _number(told["reconstruction"]),
                )
        for space, told in entry["nearest"].items():
            table.add_row(
                f"nearest by {space}",
                f"{told['own']:.0%}",
                interval(told["interval"], ".0%"),
                "" if told["shuffled"] is None else f"{told['shuffled']:.0%}",
                f"chance {told['chance']:.0%}",
            )
        table.caption = "Nearest: how often its own reference was the nearest of all. Tokenizer: what it loses alone."
        tables.append(table)
    return tables


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
