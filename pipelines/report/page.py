"""`braid report`: what went into a run, how it learned and what came out, on one page.

Enters: a dataset and rows of it, a run's folder, a folder of generated files; any of them may be left out. Leaves: one HTML
file with everything inside, which opens by double click. Always holds: the page asks nothing of any network, its policy
forbids it to, and no text of the data can become markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.report.charts import share_bar
from pipelines.report.frame import write_document
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.media import GeneratedFile, picture, prose, read_generated, sound
from pipelines.report.summary import summarize
from pipelines.report.training import Run, read_run, training_section
from pipelines.rows import rows_at, spread
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.statistics import MODALITIES
from pipelines.show import ShownRow, show

_PLURALS = {Modality.TEXT: "Texts", Modality.IMAGE: "Pictures", Modality.AUDIO: "Sounds"}


def report(
    out: Path,
    *,
    run: Path | None = None,
    dataset: str | None = None,
    version: int | None = None,
    generated: Path | None = None,
    rows: int | list[str] = 12,
    title: str | None = None,
) -> Path:
    """Write the page of a run, opening what the arguments name.

    Args:
        version: of the dataset; the newest by default.
        rows: rows of the dataset to decode, by index or id; or how many, spread evenly over it.
        title: by default the name of the run, or of the dataset.

    Raises:
        PageError: a folder is not what it should be.
        DatasetError: no dataset there.
        VocabularyError: its tokenizers are not those that it was made with.
    """
    opened = Dataset.open(dataset, version) if dataset else None
    shown: list[ShownRow] = []
    if opened:
        shown = list(show(opened, rows_at(opened, spread(opened, rows)) if isinstance(rows, int) else rows))
    named = title or next((Path(place).name for place in (run, dataset, generated) if place), "Braid")
    return write_page(out, dataset=opened, rows=shown, run=run, generated=generated, title=named)


def write_page(
    out: Path, *, dataset: Dataset | None, rows: list[ShownRow], run: Path | None, generated: Path | None, title: str
) -> Path:
    """Write one HTML file about whatever is given.

    Args:
        dataset: its figures come from the roll-up; nothing is scanned.
        rows: decoded rows to show, in this order.
        run: folder of a pretraining run, finished or not.
        generated: folder that `braid generate` wrote.

    Returns:
        `out`.

    Raises:
        PageError: `run` or `generated` is not what it should be, or a record of a generated file is damaged.
    """
    told = read_run(run) if run else None
    files = read_generated(generated) if generated else []
    sections: list[tuple[str, str, Markup]] = []
    if dataset is not None or rows:
        sections.append(("input", "What went in", _input_section(summarize(dataset) if dataset else None, rows)))
    if told is not None:
        sections.append(("training", "How it learned", training_section(told)))
    if files:
        sections.append(("output", "What came out", _output_section(files)))
    return write_document(out, title, _subtitle(dataset, told), sections)


def _subtitle(dataset: Dataset | None, run: Run | None) -> str:
    parts = [f"dataset {Path(dataset.uri).name}, version {dataset.version}"] if dataset else []
    if run:
        parts.append(f"run {run.folder.resolve().name}, {'finished' if run.finished else 'not finished'}")
    return " · ".join(parts)


def _input_section(figures: dict[str, Any] | None, rows: list[ShownRow]) -> Markup:
    cards = [_row(row) for row in rows]
    return tag(
        "section",
        tag("h2", "What went in", id="input"),
        _figures(figures) if figures else None,
        tag("h3", "Rows, decoded from their tokens") if cards else None,
        tag("div", *cards, class_="cards") if cards else None,
        aria_labelledby="input",
    )


def _figures(figures: dict[str, Any]) -> Markup:
    tokens, total = figures["tokens"], max(figures["tokens"]["total"], 1)
    present = [m for m in MODALITIES if tokens[m]]
    key_figures = [
        (f"{figures['documents']:,}", "documents"),
        (f"{tokens['total']:,}", "tokens"),
        (f"{len(figures['sources']):,}", "sources" if len(figures["sources"]) != 1 else "source"),
        (f"{figures['bytes'] / 1e6:,.1f} MB", f"in {figures['shards']:,} shards"),
    ]
    by_modality = [
        (
            tag("span", modality, class_=f"key {modality}"),
            f"{tokens[modality]:,}",
            f"{tokens[modality] / total:.1%}",
            f"{figures['spans'][modality]['count']:,}",
            f"{figures['spans'][modality]['length']['0.5']:,}",
            f"{figures['spans'][modality]['length']['1']:,}",
        )
        for modality in present
    ]
    sources = [
        (name, f"{source['documents']:,}", *(f"{source['tokens'][m]:,}" for m in present))
        for name, source in figures["sources"].items()
    ]
    codebooks = [
        (
            name,
            f"{book['size']:,}",
            f"{book['used'] / max(book['size'], 1):.1%}",
            f"{book['entropy_bits']:.2f}",
            f"{book['perplexity']:,.1f}",
        )
        for name, book in figures["codebooks"].items()
    ]
    tables = [
        table("Tokens, and lengths of spans", ("", "tokens", "share", "spans", "median", "longest"), by_modality),
        table("Documents and tokens by source", ("", "documents", *present), sources),
        table("Use of the codebooks", ("", "size", "used", "entropy (bits)", "perplexity"), codebooks),
    ]
    if figures["quarantine"]:
        reasons = [(reason, f"{count:,}") for reason, count in figures["quarantine"].items()]
        tables.append(table("In quarantine", ("reason", "documents"), reasons))
    return join(
        [
            tag("dl", *(tag("div", tag("dd", v), tag("dt", name)) for v, name in key_figures), class_="figures"),
            share_bar("shares", "Share of the tokens by modality", [(m, tokens[m] / total) for m in present]),
            tag("div", *tables, class_="tables"),
            tag("p", "The tokens that open a picture or a sound count as text.", class_="note"),
        ]
    )


def _row(row: ShownRow) -> Markup:
    told = " ".join(" ".join((span.text or "").split()) for span in row.spans)
    about = told[:120] or row.source
    parts: list[Markup] = []
    for span in row.spans:
        if span.text is not None:
            parts.append(prose(span.text))
        elif span.pixels is not None:
            parts.append(picture(span.to_bytes(), f"Decoded picture of the row: {about}"))
        else:
            parts.append(sound(span.to_bytes(), f"Decoded sound of the row: {about}"))
    foot = tag("footer", tag("span", row.source, class_="source"), f" {row.row_id[:12]}, {row.num_tokens:,} tokens")
    return tag("article", *parts, foot, class_="card")


def _output_section(files: list[GeneratedFile]) -> Markup:
    groups: list[Markup] = []
    for modality in (Modality.IMAGE, Modality.AUDIO, Modality.TEXT):
        made = [_made(file) for file in files if file.modality is modality]
        if made:
            layout = "cards wide" if modality is Modality.TEXT else "cards"
            groups.append(join([tag("h3", _PLURALS[modality]), tag("div", *made, class_=layout)]))
    return tag("section", tag("h2", "What came out", id="output"), *groups, aria_labelledby="output")


def _made(file: GeneratedFile) -> Markup:
    prompt = file.prompt_text
    asked = f"for the prompt: {prompt}" if prompt else "without a prompt" if file.record else f"in {file.name}"
    begun = ""
    if file.modality is Modality.TEXT:
        text = file.content.decode("utf-8", "replace").removesuffix("\n")
        last = file.prompt[-1] if file.prompt else ("", "")
        # The first generated text goes on in the middle of the prompt's last one.
        begun = last[1] if last[0] == "text" and not file.record.get("span") else ""
        content = prose(text, before=begun)
    elif file.modality is Modality.IMAGE:
        content = picture(file.content, f"Generated picture {asked}")
    else:
        content = sound(file.content, f"Generated sound {asked}")
    shown_prompt = tag("p", prompt, class_="prompt", dir="auto") if prompt and begun != prompt else None
    caption = tag("figcaption", shown_prompt, tag("p", _settings(file), class_="settings"))
    return tag("figure", content, caption, class_="card")


def _settings(file: GeneratedFile) -> str:
    record = file.record
    if not record:
        return file.name
    sampling = record.get("sampling", {}).get(file.modality.label, {})
    parts = [] if record["prompt"] else ["no prompt"]
    parts += [f"{name} {record[name]}" for name in ("seed", "sample", "step") if record.get(name) is not None]
    neutral = {"top_k": (None,), "top_p": (None, 1), "min_p": (None, 0)}
    parts += [
        f"{name.replace('_', '-')} {value:g}"
        for name, value in sampling.items()
        if value not in neutral.get(name, (None,))
    ]
    return ", ".join(
        [*parts, *(["cut at its limit"] if record.get("truncated") and file.modality is Modality.TEXT else [])]
    )
