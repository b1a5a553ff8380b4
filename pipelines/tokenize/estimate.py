"""`--dry-run`: what a job would do, estimated from documents that are really tokenized here and now."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.table import Table

from pipelines.corpus.documents import Slice
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.statistics import MODALITIES
from pipelines.tokenize.job import check_dataset
from pipelines.tokenize.planning import Plan, Request, dry_plan
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker

SAMPLED_UNITS = 3
SAMPLED_INPUTS = 8
SAMPLED_BYTES = 64 * 2**10
"""Of each of so many units of a source so many inputs are tokenized, of divisible ones so many bytes; nothing is written."""

BYTES_PER_TOKEN = 2.4
"""Of a zstd shard, as measured on real text and media."""


@dataclass(kw_only=True)
class Estimate:
    """What is to be done, of one source or of all."""

    units: int = 0
    done: int = 0
    input_bytes: int = 0
    documents: float = 0.0
    tokens: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0.0))
    seconds: float = 0.0
    """Of one worker."""


def estimate(
    recipe: TokenizeRecipe,
    request: Request = Request(),  # noqa: B008 - it is frozen
) -> tuple[dict[str, Estimate], Plan]:
    """Plan the job and try a few documents.

    Returns:
        The estimate for each source, and the plan.
    """
    worker = UnitWorker(recipe)
    dataset = Dataset.open(recipe.dataset) if Dataset.exists(recipe.dataset) else None
    if dataset:
        check_dataset(dataset, recipe, worker.vocabulary)
    plan = dry_plan(dataset, recipe.sources, recipe.units, request)
    by_source = {source.name: [u for u in plan.pending if u.source == source.name] for source in recipe.sources}
    return {name: _estimate(worker, units) for name, units in by_source.items()}, plan


def _estimate(worker: UnitWorker, units: list[WorkUnit]) -> Estimate:
    total = Estimate(units=len(units), input_bytes=sum(unit.size for unit in units))
    sampled_bytes, sampled = 0, Estimate()
    for unit in units[:: max(1, len(units) // SAMPLED_UNITS)][:SAMPLED_UNITS]:
        few = replace(unit, slices=tuple(_shortened(piece) for piece in unit.slices[:SAMPLED_INPUTS]))
        began = time.monotonic()
        rows = list(worker.rows(few))
        sampled.seconds += time.monotonic() - began
        sampled_bytes += few.size
        sampled.documents += len(rows)
        for row in rows:
            if isinstance(row, Row):
                for modality in Modality:
                    sampled.tokens[modality.label] += row.sequence.count(modality)
    if sampled_bytes:
        scale = total.input_bytes / sampled_bytes
        total.documents = sampled.documents * scale
        total.seconds = sampled.seconds * scale
        total.tokens = {modality: count * scale for modality, count in sampled.tokens.items()}
    return total


def _shortened(piece: Slice) -> Slice:
    """The beginning of a slice that may be cut anywhere, or the whole of one that may not."""
    if not piece.input.divisible:
        return piece
    return replace(piece, stop=min(piece.stop, piece.start + SAMPLED_BYTES))


def render(result: tuple[dict[str, Estimate], Plan], console: Console, workers: int | None) -> None:
    """Print an estimate as a table."""
    estimates, plan = result
    table = Table("source", "units", "input", "documents", *MODALITIES, "shards", "1 worker")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, e in estimates.items():
        tokens = sum(e.tokens.values())
        table.add_row(
            name,
            f"{e.units:,}",
            f"{_short(e.input_bytes)}B",
            _short(e.documents),
            *(_short(e.tokens[m]) for m in MODALITIES),
            f"{_short(tokens * BYTES_PER_TOKEN)}B",
            _duration(e.seconds),
        )
    console.print(table)
    for name, missing in plan.missing.items():
        fate = "their rows go" if plan.together else "their rows stay, unless --retire-missing is given"
        examples = ", ".join(missing.examples)
        console.print(
            f"{name}: {missing.inputs:,} inputs are no longer there, such as {examples}; {fate}.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    count = workers or os.cpu_count() or 1
    seconds = sum(e.seconds for e in estimates.values()) / count
    units = sum(e.units for e in estimates.values())
    console.print(
        f"{units:,} units to do, {plan.done:,} done. "
        f"About {_duration(seconds)} with {count} workers, after some 15 s to start. "
        "Documents, tokens and time are scaled up from a sample that was tokenized just now; nothing was written.",
        highlight=False,
        soft_wrap=True,
    )


def _short(value: float) -> str:
    """Three digits are all that an estimate is good for: 950, 15.2 k, 1.25 M."""
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
