"""How a model learned, as a section of a page: from the folder of a pretraining run, finished or not.

Enters: the files that `pipelines.pretrain.run` describes. Leaves: `Markup`. Always holds: a figure on the page is one of
the run's files, or a mean over them that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import UnifiedTransformerConfig
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import read_finished
from pipelines.pretrain.validate import CrossEntropy
from pipelines.recipe import dump_recipe, read_recipe
from pipelines.report.charts import Line, line_chart, short, thin
from pipelines.report.markup import Markup, table, tag
from pipelines.report.media import PageError
from pipelines.sequence import Modality

_LABELLED_CODEBOOKS = 8
"""Labels of more lines would lie over one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run's folder tells."""

    folder: Path
    recipe: PretrainRecipe | None
    model: UnifiedTransformerConfig | None
    """Of the exported model, which a finished run has."""
    finished: bool
    train: list[dict[str, Any]]
    """The records of the steps, in order."""
    validations: list[tuple[int, CrossEntropy]]
    baseline: CrossEntropy | None

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def last(self) -> CrossEntropy | None:
        """The newest validation."""
        return self.validations[-1][1] if self.validations else None


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        PageError: it holds no run.
        RecipeError: its recipe is not one of this Braid.
        RunError: a line of its metrics is damaged.
    """
    recipe_file, metrics, model_file = folder / "recipe.yaml", folder / "metrics.jsonl", folder / "model/config.json"
    if not (recipe_file.exists() or metrics.exists()):
        raise PageError(f"{folder}: no run of Braid; name the folder that is `output` in the recipe of a run")
    train, validations, baselines = (
        read_metrics(metrics, kind) if metrics.exists() else [] for kind in ("train", "validation", "baseline")
    )
    baseline = CrossEntropy.from_json(baselines[-1]["loss"]) if baselines else None
    finished = read_finished(folder)
    return Run(
        folder=folder,
        recipe=read_recipe(PretrainRecipe, recipe_file) if recipe_file.exists() else None,
        model=UnifiedTransformerConfig.from_dict(json.loads(model_file.read_bytes())) if model_file.exists() else None,
        finished=finished is not None,
        train=train,
        validations=[(r["step"], CrossEntropy.from_json(r["loss"])) for r in validations],
        baseline=baseline or (finished.baseline if finished else None),
    )


def training_section(run: Run) -> Markup:
    """Key figures, the loss beside what token frequencies reach, charts, recipe."""
    charts = [chart for chart in [*_loss_charts(run), _codebook_chart(run), *_pace_charts(run)] if chart]
    return tag(
        "section",
        tag("h2", "How it learned", id="training"),
        _key_figures(run),
        _final_losses(run),
        _legend(run) if charts else None,
        tag("div", *charts, class_="charts") if charts else None,
        _history(run),
        _recipe(run),
        aria_labelledby="training",
    )


def _key_figures(run: Run) -> Markup | None:
    figures: list[tuple[str, str]] = []
    if run.model:
        blocks = f"{run.model.num_layers} layers of width {run.model.hidden_size:,}"
        figures.append((f"parameters, {blocks}", short(float(f"{run.model.num_parameters():.3g}"))))
    if run.recipe and run.train:
        slots = run.recipe.tokens_per_step
        tokens = [slots * (1 - record["padding_share"]) for record in run.train]
        seconds = sum(count / record["tokens_per_s"] for count, record in zip(tokens, run.train, strict=True))
        state = "" if run.steps == run.recipe.total_steps else f" of {run.recipe.total_steps:,}"
        figures += [
            ("steps", f"{run.steps:,}{state}"),
            (f"tokens seen, in sequences of {run.recipe.data.sequence_length:,}", short(float(f"{sum(tokens):.3g}"))),
            ("of training, without validation and checkpoints", duration(seconds)),
            (f"tokens a second, {run.recipe.precision}", f"{sum(tokens) / seconds:,.0f}"),
        ]
    elif run.train:
        figures.append(("steps", f"{run.steps:,}"))
    entries = [tag("div", tag("dd", value), tag("dt", name)) for name, value in figures]
    return tag("dl", *entries, class_="figures") if entries else None


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"


def _final_losses(run: Run) -> Markup | None:
    if run.last is None:
        return None
    reference = dict(run.baseline.items()) if run.baseline else {}
    rows = []
    for name, loss in run.last.items():
        known = reference.get(name)
        rows.append(
            (
                _row_name(name),
                f"{loss:.3f}",
                f"{known:.3f}" if known is not None else "",
                f"{known - loss:.3f}" if known is not None else "",
                # exp of a mean difference of log likelihoods: how many times likelier a held-out token became.
                f"{math.exp(known - loss):.2f}" if known is not None else "",
            )
        )
    step = run.validations[-1][0]
    return table(
        f"Loss on held-out documents at step {step:,}, in nats a token, beside smoothed token frequencies (unigram)",
        ("", "validation", "unigram", "below it by", "times likelier"),
        rows,
    )


def _row_name(name: str) -> Markup:
    modality, _, codebook = name.partition("/")
    said = f"codebook {codebook}" if codebook else modality
    return tag("span", said, class_=f"key {modality}{' sub' if codebook else ''}")


def _loss_charts(run: Run) -> list[Markup]:
    charts = []
    for modality in Modality:
        name = modality.label
        seen = [(float(r["step"]), r["loss"][name]) for r in run.train if r["loss"][name] is not None]
        train, each = thin(seen)
        checked = [(float(step), v) for step, loss in run.validations if (v := getattr(loss, name)) is not None]
        level = getattr(run.baseline, name) if run.baseline else None
        ends = [x for x, _ in [*seen, *checked]]
        lines, said = [], []
        if train:
            said.append(f"Training from {train[0][1]:.2f} to {train[-1][1]:.2f}")
            lines.append(Line(name="training", points=train, style="train"))
        if level is not None and ends:
            said.append(f"unigram {level:.2f}")
            lines.append(
                Line(name="unigram", points=[(0.0, level), (max(ends), level)], style="reference",
                     label=f"{level:.2f}")
            )  # fmt: skip
        if checked:
            said.append(f"validation {checked[-1][1]:.2f} at step {checked[-1][0]:,.0f}")
            last = f"{checked[-1][1]:.2f}"
            lines.append(Line(name="validation", points=checked, style="validation", label=last, markers=True))
        if not lines:
            continue
        note = f"training: means of {each} steps" if each > 1 else ""
        chart = line_chart(
            f"loss-{name}", f"Loss of {name} by step", "; ".join(said) + ".", lines, y_label="nats a token", tone=name
        )
        charts.append(_figure(name.capitalize(), note, chart))
    return charts


def _codebook_chart(run: Run) -> Markup | None:
    """Validation by codebook, each against its own unigram, which makes all of them comparable."""
    count = len(run.last.audio_codebooks) if run.last else 0
    levels = run.baseline.audio_codebooks if run.baseline else (0.0,) * count
    lines, said = [], []
    for q in range(count):
        level = levels[q]
        points = [
            (float(step), v - level)
            for step, loss in run.validations
            if (v := loss.audio_codebooks[q]) is not None and level is not None
        ]
        if not points:
            continue
        labelled = count <= _LABELLED_CODEBOOKS or q in (0, count - 1)
        style = f"shade-{round(q * 7 / max(count - 1, 1))}"
        lines.append(
            Line(name=f"codebook {q}", points=points, style=style, label=f"cb {q}" if labelled else "", markers=True)
        )
        said.append(f"codebook {q} {points[-1][1]:+.2f}")
    if not lines:
        return None
    steps = [x for line in lines for x, _ in line.points]
    if run.baseline:
        zero = [(0.0, 0.0), (max(steps), 0.0)]
        lines.insert(0, Line(name="unigram", points=zero, style="reference", label="unigram"))
    shown = "validation minus unigram" if run.baseline else "validation"
    title, description = f"Loss of audio by codebook: {shown}", f"At step {steps[-1]:,.0f}: {', '.join(said)}."
    chart = line_chart("codebooks", title, description, lines, y_label="nats a token", tone="audio")
    return _figure("Audio by codebook", shown, chart)


def _pace_charts(run: Run) -> list[Markup]:
    def chart(key: str, title: str, unit: str, read: Callable[[dict[str, Any]], float]) -> Markup | None:
        points, each = thin([(float(r["step"]), read(r)) for r in run.train])
        if not points:
            return None
        values = [y for _, y in points]
        said = f"From {short(values[0])} to {short(values[-1])}, at most {short(max(values))}."
        lines = [Line(name=title, points=points, style="plain")]
        note = f"means of {each} steps" if each > 1 else ""
        return _figure(title, note, line_chart(key, title, said, lines, y_label=unit, from_zero=True))

    return [
        drawn
        for drawn in (
            chart("learning-rate", "Learning rate", "", lambda r: r["learning_rate"]),
            chart("speed", "Speed", "tokens a second", lambda r: r["tokens_per_s"]),
        )
        if drawn
    ]


def _figure(title: str, note: str, chart: Markup) -> Markup:
    caption = tag("figcaption", tag("strong", title), tag("span", note, class_="note") if note else None)
    return tag("figure", caption, chart, class_="panel")


def _legend(run: Run) -> Markup:
    known: Sequence[tuple[str, str, bool]] = (
        ("train", "training", bool(run.train)),
        ("validation", "validation", bool(run.validations)),
        ("reference", "unigram: what token frequencies alone reach", run.baseline is not None),
    )
    entries = []
    for style, name, there in known:
        if there:
            dot = tag("circle", cx=14, cy=6, r=3.2, class_=f"dot {style}") if style == "validation" else None
            swatch = tag("svg", tag("path", d="M0 6H28", class_=f"line {style}"), dot, viewBox="0 0 28 12",
                         aria_hidden="true", class_="swatch")  # fmt: skip
            entries.append(tag("li", swatch, name))
    return tag("ul", *entries, class_="legend", aria_label="Legend of the charts")


def _history(run: Run) -> Markup | None:
    if not run.validations:
        return None
    names = [name for name, _ in run.validations[-1][1].items()]
    rows = []
    for step, loss in run.validations:
        known = dict(loss.items())
        rows.append((f"{step:,}", *(f"{known[name]:.3f}" if name in known else "" for name in names)))
    return tag("details", tag("summary", "All validations"), table("Validation loss by step", ("step", *names), rows))


def _recipe(run: Run) -> Markup | None:
    if run.recipe is None:
        return None
    text = tag("pre", tag("code", dump_recipe(run.recipe)), tabindex=0, aria_label="Recipe")
    return tag("details", tag("summary", "The recipe"), text)
