"""The page of a pipeline: past runs, how long they took, what came in, losses, failures.

Enters: the state folder. Leaves: one HTML file that opens anywhere and asks no network. Always holds: it is written anew
from the records, in one step, so whoever looks sees a whole page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipelines.recurring.bars import stacked_bars
from pipelines.recurring.entries import Installed
from pipelines.recurring.history import MODALITIES, losses, took
from pipelines.recurring.memory import Memory
from pipelines.recurring.schedule import Schedule
from pipelines.recurring.state import Record, State
from pipelines.report.charts import Line, line_chart, short
from pipelines.report.frame import Section, write_document
from pipelines.report.markup import Markup, join, table, tag

SHOWN = 60
"""Runs in the charts; more bars than that cannot be told apart."""

LISTED = 400
"""Runs in the table; `braid pipeline history --json` has all."""

_SIGNS = {"done": "✓", "skipped": "-", "refused": "≠", "failed": "✗", "lost": "?"}

_MEANINGS = {
    "done": "done",
    "skipped": "nothing was due",
    "refused": "refused by the evaluation",
    "failed": "a step failed",
    "lost": "ended without a word",
}


_UNWELL = ("outcome", "begun (UTC)", "why", "failed attempts", "told")


def write_page(state: State, name: str, out: Path | None = None) -> Path:
    """Write the page; `history.html` in the state folder by default."""
    records = list(state.records(LISTED))
    sections: list[Section] = []
    if records:
        sections.append(("overview", "Overview", _overview(records, state)))
        sections.append(("charts", "Charts", _charts(records[:SHOWN])))
        if any(r.outcome in ("failed", "refused", "lost") for r in records):
            sections.append(("failures", "Failures", _failures(records)))
        sections.append(("runs", "All runs", _runs(records)))
    subtitle = _subtitle(state)
    final = out or state.page
    partial = final.with_name(f".{final.name}.partial")
    write_document(partial, f"Pipeline {name}", subtitle, sections, styles="pipeline.css")
    partial.replace(final)
    return final


def _subtitle(state: State) -> str:
    parts = []
    if paused := state.paused:
        parts.append(f"paused by {paused['by']} at {paused['at']}")
    if installed := Installed.of(state):
        upcoming = Schedule(installed.at).next_after(datetime.now())
        parts.append(
            f"ticks by {installed.via} on {installed.host} ({installed.at}), next at {upcoming:%Y-%m-%d %H:%M}"
        )
    parts.append(f"written {datetime.now():%Y-%m-%d %H:%M}")
    return " · ".join(parts)


def _overview(records: Sequence[Record], state: State) -> Markup:
    newest = records[0]
    counted: Counter[str] = Counter(r.outcome for r in records)
    figures = [
        (f"{len(state.numbers()):,}", "runs"),
        (
            _SIGNS[newest.outcome] + f" run {newest.number}",
            f"last: {_MEANINGS[newest.outcome]}, {_moment(newest.ended)} UTC",
        ),
        (short(float(sum(r.documents for r in records))), "documents came in"),
        (short(float(sum(r.tokens for r in records))), "tokens came in"),
        (f"{newest.trained_to:,}", "steps trained"),
    ]
    cells = []
    for r in reversed(records[:SHOWN]):
        told = f"run {r.number}, {_moment(r.begun)} UTC: {r.outcome}. {r.why}"
        sign = tag("span", _SIGNS[r.outcome], aria_hidden="true")
        cells.append(tag("li", sign, tag("span", told, class_="unseen"), class_=r.outcome, title=told))
    legend = [
        tag("li", tag("span", sign, class_=f"sign {name}"), f"{_MEANINGS[name]}: {counted[name]}")
        for name, sign in _SIGNS.items()
        if counted[name]
    ]
    return tag(
        "section",
        tag("h2", "Overview", id="overview"),
        tag("dl", *(tag("div", tag("dd", v), tag("dt", n)) for v, n in figures), class_="figures"),
        tag("ol", *cells, class_="strip", aria_label="The last runs, the newest at the end"),
        tag("ul", *legend, class_="legend"),
        aria_labelledby="overview",
    )


def _charts(newest_first: Sequence[Record]) -> Markup:
    records = list(reversed(newest_first))
    charts = [_durations(records), _tokens(records), *_losses(records)]
    return tag(
        "section",
        tag("h2", "Charts", id="charts"),
        tag("div", *(chart for chart in charts if chart), class_="charts"),
        aria_labelledby="charts",
    )


def _durations(records: Sequence[Record]) -> Markup:
    """How long each run took, by step; attempts that failed count."""
    longest = max((r.seconds for r in records), default=0.0)
    unit, seconds = ("h", 3600.0) if longest > 2 * 3600 else ("min", 60.0) if longest > 120 else ("s", 1.0)
    runs = []
    for record in records:
        parts = {step: sum(r.seconds for r in record.steps if r.step == step) / seconds for step in record.planned}
        rest = record.seconds / seconds - sum(parts.values())
        runs.append((record.number, {k: v for k, v in (parts | {"waiting": max(rest, 0.0)}).items() if v > 0}))
    total = sum(r.seconds for r in records)
    said = f"{len(records)} runs, {took(total / max(len(records), 1))} on average, {took(longest)} the longest."
    names = [name for name in ("tokenize", "pretrain", "evaluate", "export", "clean", "waiting") if _among(name, runs)]
    return _panel("Duration", stacked_bars("durations", "Duration of each run", said, runs, y_label=unit), names)


def _tokens(records: Sequence[Record]) -> Markup:
    """What came in with each run, by modality where the step could still say."""
    runs = []
    for record in records:
        by_modality = record.did("by_modality") or {}
        parts = {name: float(by_modality.get(name, 0)) for name in MODALITIES}
        rest = max(record.tokens - sum(parts.values()), 0.0)
        runs.append((record.number, {k: v for k, v in (parts | {"untold": rest}).items() if v > 0}))
    said = f"{sum(r.tokens for r in records):,} new tokens in {len(records)} runs."
    names = [name for name in (*MODALITIES, "untold") if _among(name, runs)]
    return _panel("New tokens", stacked_bars("tokens", "New tokens of each run", said, runs, y_label="tokens"), names)


def _losses(records: Sequence[Record]) -> list[Markup]:
    """Validation loss after each stage, a chart a modality, beside what token frequencies reach."""
    charts = []
    for name in MODALITIES:
        points = [(float(r.did("to_step")), losses(r)[name]) for r in records if name in losses(r)]
        known = [(float(r.did("to_step")), (r.did("baseline") or {}).get(name)) for r in records if name in losses(r)]
        if not points:
            continue
        baseline = [(x, float(y)) for x, y in known if y is not None]
        lines = [Line(name=f"{name} loss", points=points, style="validation", label="model", markers=True)]
        if baseline:
            lines.append(Line(name="unigram", points=baseline, style="reference", label="unigram"))
        ends = [f"{loss:.3f} nats a token at step {step:,.0f}" for step, loss in (points[0], points[-1])]
        said = f"{name}: from {ends[0]} to {ends[1]}."
        chart = line_chart(f"loss-{name}", f"Loss of {name}", said, lines, y_label="nats a token", tone=name)
        charts.append(_panel(f"Validation loss of {name}, after each stage", chart, []))
    return charts


def _panel(title: str, chart: Markup, names: Sequence[str]) -> Markup:
    keys = [tag("span", name, class_=f"key {name}") for name in names]
    return tag("figure", tag("figcaption", tag("strong", title), *keys), chart, class_="panel")


def _among(name: str, runs: Sequence[tuple[int, dict[str, float]]]) -> bool:
    return any(name in parts for _, parts in runs)


def _failures(records: Sequence[Record]) -> Markup:
    rows = []
    for record in records:
        if record.outcome in ("failed", "refused", "lost"):
            attempts = Counter(r.step for r in record.steps if r.outcome == "failed")
            tried = ", ".join(f"{step}, {_times(count, 'attempt')}" for step, count in attempts.items())
            told = ", ".join(f"{a['event']} to {a['to']}{' (failed)' if a['error'] else ''}" for a in record.alerts)
            why = tag("span", record.why, class_="wrap")
            cells = (_start(_moment(record.begun)), why, _start(tried), _start(told))
            rows.append((f"run {record.number}", _outcome(record), *cells))
    memory = Memory.of(records[0].memory)
    open_counts = [f"{step} has failed in {_times(n, 'run')} in a row" for step, n in memory.failed.items()]
    open_counts += [f"unit {unit} has failed in {_times(n, 'run')}" for unit, n in memory.units.items()]
    note = "; ".join(open_counts) or "Nothing is failing at present."
    return tag(
        "section",
        tag("h2", "Failures", id="failures"),
        tag("p", note, class_="note"),
        tag(
            "div",
            table(
                "Runs that did not end well",
                ("", *map(_start, ("outcome", "begun (UTC)", "why", "failed", "told"))),
                rows,
            ),
        ),
        aria_labelledby="failures",
    )


def _runs(records: Sequence[Record]) -> Markup:
    present = [name for name in MODALITIES if any(name in losses(r) for r in records)]
    header = (
        "",
        _start("outcome"),
        "begun (UTC)",
        "by",
        "took",
        "documents",
        "tokens",
        "version",
        "steps",
        "stage",
        *present,
    )
    rows = [
        (
            f"run {r.number}",
            _outcome(r),
            _moment(r.begun),
            r.trigger,
            took(r.seconds),
            f"{r.documents:,}",
            f"{r.tokens:,}",
            f"{r.version}",
            f"{r.steps_trained:,}" if r.steps_trained else "",
            f"{r.did('stage')}" if r.did("stage") else "",
            *(f"{losses(r)[name]:.3f}" if name in losses(r) else "" for name in present),
        )
        for r in records
    ]
    return tag(
        "section",
        tag("h2", "All runs", id="runs"),
        table("The newest first; losses in nats a token on held-out documents", header, rows),
        aria_labelledby="runs",
    )


def _moment(time: str) -> str:
    """To the minute."""
    return time[:16].replace("T", " ")


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


def _start(text: str) -> Markup:
    """A cell of words, which begins where its column does."""
    return tag("span", text, class_="words")


def _outcome(record: Record) -> Markup:
    return join([tag("span", _SIGNS[record.outcome], class_=f"sign {record.outcome}"), f" {record.outcome}"])
