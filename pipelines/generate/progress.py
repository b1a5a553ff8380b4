"""The progress bar of generation: share done, tokens, tokens a second, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Watches a generation; silent on a console that is no terminal."""

    def __init__(self, console: Console, label: str = "generating") -> None:
        self._bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens  {task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None
        self._done = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, tokens: int) -> None:
        self._began, self._done = time.monotonic(), 0
        self._task = self._bar.add_task("", total=tokens, rate=0.0)

    def advanced(self, tokens: int) -> None:
        self._done += tokens
        if self._task is not None:
            rate = self._done / max(time.monotonic() - self._began, 1e-3)
            self._bar.update(self._task, completed=self._done, rate=rate)
