"""Runs side by side, as one HTML page: their curves in the same charts, and what differs in their recipes.

Enters: the folders of runs. Leaves: a file that opens anywhere. Always holds: every figure is one of the runs' files, or a
mean over them that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.report.charts import Line, line_chart, short, thin
from pipelines.report.frame import write_document
from pipelines.report.markup import Markup, table, tag
from pipelines.report.media import PageError
from pipelines.report.training import Run, read_run
from pipelines.sequence import Modality

_MOST = 8
"""As many shades as the style sheet has."""


def compare(page: Path, folders: Sequence[Path]) -> Path:
    """Write the page; returns it.

    Raises:
        PageError: fewer than two runs, more than eight, or a folder that holds none.
    """
    if not 2 <= len(folders) <= _MOST:
        raise PageError(f"{len(folders)} runs are given: name two to {_MOST}")
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    charts = [
        chart
        for modality in Modality
        for chart in (
            _chart(
                f"validation-{modality.label}",
                f"Validation loss of {modality.label}",
                names,
                runs,
                _validation(modality),
            ),
            _chart(
                f"training-{modality.label}", f"Training loss of {modality.label}", names, runs, _training(modality)
            ),
        )
        if chart
    ]
    charts += [
        chart
        for chart in (
            _chart("speed", "Tokens a second", names, runs, _of_steps("tokens_per_s")),
            _chart("norm", "Gradient norm", names, runs, _of_steps("gradient_norm")),
        )
        if chart
    ]
    section = tag(
        "section",
        tag("h2", "Side by side", id="comparison"),
        _ends(names, runs),
        tag("div", *charts, class_="charts") if charts else None,
        _recipes(names, runs),
        aria_labelledby="comparison",
    )
    return write_document(page, " and ".join(names), f"{len(runs)} runs", [("comparison", "Side by side", section)])


Points = Callable[[Run], list[tuple[float, float]]]


def _validation(modality: Modality) -> Points:
    return lambda run: [
        (float(step), value) for step, loss in run.validations if (value := getattr(loss, modality.label)) is not None
    ]


def _training(modality: Modality) -> Points:
    name = modality.label
    return lambda run: [(float(r["step"]), r["loss"][name]) for r in run.train if r["loss"][name] is not None]


def _of_steps(key: str) -> Points:
    return lambda run: [(float(r["step"]), r[key]) for r in run.train if r[key] is not None]


def _chart(key: str, title: str, names: Sequence[str], runs: Sequence[Run], points: Points) -> Markup | None:
    lines, said = [], []
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        found, _ = thin(points(run))
        if found:
            style = f"shade-{round(number * (_MOST - 1) / max(len(runs) - 1, 1))}"
            lines.append(Line(name=name, points=found, style=style, label=name[:9], markers=len(found) < 12))
            said.append(f"{name}: {short(found[-1][1])}")
    if not lines:
        return None
    chart = line_chart(key, title, f"At the end {', '.join(said)}.", lines, y_label="", tone="text")
    return tag("figure", tag("figcaption", tag("strong", title)), chart, class_="panel")


def _ends(names: Sequence[str], runs: Sequence[Run]) -> Markup:
    rows = []
    for name, run in zip(names, runs, strict=True):
        last = dict(run.last.items()) if run.last else {}
        speed = sum(r["tokens_per_s"] for r in run.train) / len(run.train) if run.train else None
        rows.append(
            (
                name,
                f"{run.steps:,}",
                *(f"{last[m.label]:.3f}" if m.label in last else "" for m in Modality),
                f"{speed:,.0f}" if speed else "",
            )
        )
    return table(
        "Validation loss at the end, in nats a token, and mean tokens a second",
        ("", "steps", *(m.label for m in Modality), "tokens/s"),
        rows,
    )


def _recipes(names: Sequence[str], runs: Sequence[Run]) -> Markup | None:
    flat = [_flat(run.recipe.model_dump(mode="json", exclude={"output"})) if run.recipe else {} for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [
        (key, *(str(values.get(key, "")) for values in flat))
        for key in keys
        if len({str(values.get(key)) for values in flat}) > 1
    ]
    return table("What differs in the recipes", ("", *names), rows) if rows else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two are called alike."""
    short_names = [folder.resolve().name for folder in folders]
    return short_names if len(set(short_names)) == len(folders) else [str(folder) for folder in folders]
