"""The progress bar of a tokenize job: share done, documents, tokens a second, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.shards.statistics import Statistics
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.planning import Plan
from pipelines.tokenize.units import WorkUnit


class ProgressBar:
    """Draws a `Plan` as it is worked off; on a console that is no terminal, one line for each tenth."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("tokenizing"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("units"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[documents]:,} documents  {task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._documents = self._tokens = self._units = self._total = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, plan: Plan) -> None:
        self._began = time.monotonic()
        self._total = len(plan.pending)
        self._task = self._bar.add_task("", total=self._total, documents=0, rate=0.0)

    def finished(self, unit: WorkUnit, shard: WrittenShard, statistics: Statistics) -> None:
        self._units += 1
        self._documents += shard.rows
        self._tokens += statistics.tokens()
        rate = self._tokens / max(time.monotonic() - self._began, 1e-3)
        if self._task is not None:
            self._bar.update(self._task, completed=self._units, documents=self._documents, rate=rate)
        crossed = self._units * 10 // self._total > (self._units - 1) * 10 // self._total
        if not self._console.is_terminal and crossed:
            self._console.print(
                f"tokenizing  {self._units}/{self._total} units  {self._documents:,} documents  {rate:,.0f} tokens/s"
            )
