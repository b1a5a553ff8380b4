"""What a run tells: JSON lines, which are the truth, a line on the screen, and what `boards` draw.

Enters: one record for each step and validation. Leaves: `RUN/metrics.jsonl`, a progress line, points of curves. Always
holds: the JSON lines of a run that was killed and went on are those of an undisturbed run, but for times and speeds.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from model import MODALITIES
from pipelines.pretrain.boards import open_boards
from pipelines.pretrain.by_dataset import ByDataset, Datasets
from pipelines.pretrain.mfu import utilisation
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError
from pipelines.pretrain.step import Losses
from pipelines.pretrain.validate import CrossEntropy
from pipelines.shards.storage import naming_a_full_disk

Record = Mapping[str, Any]

ROLL_BACK = "roll_back"
"""Kind of the records of a run that went back to a checkpoint, each under the first step that was taken anew."""

SAVE = "save"
"""Kind of the records of checkpoints, under the step that each was made after: how long training paused for it."""


@dataclass(slots=True)
class Pause:
    """Time that is no training."""

    seconds: float = 0.0
    """Known when the pause is over."""


class Metrics:
    """Writes records; on other ranks than the first it does nothing."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        *,
        start: int,
        datasets: Datasets,
        device: torch.device,
        flops_per_token: Mapping[str, float],
        peak_tflops: float | None,
        console: Console,
        enabled: bool,
    ) -> None:
        """
        Args:
            start: steps taken before; records of later ones are dropped, for those steps are taken again.
            device: of this rank.
            peak_tflops: of all devices together; None, where it is not known, tells no MFU.

        Raises:
            RunError: W&B is asked for and refuses.
        """
        self._enabled = enabled
        self._every = recipe.logging.every
        self._most_not_numbers, self._not_numbers = recipe.faults.nonfinite_steps, 0
        self._total, self._slots = recipe.total_steps, recipe.tokens_per_step
        self._datasets, self._device = datasets, device
        self._flops_per_token, self._peak_tflops = flops_per_token, peak_tflops
        self.spike: tuple[int, Record] | None = None
        """The first step, of those that the host has heard of, that was skipped as a spike; for who reads it to clear."""
        self._console = console
        self._pending: list[tuple[int, float, Tensor]] = []
        self._last: Record = {}
        self._waited = self._paused = 0.0
        self._since = time.perf_counter()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task("train", total=self._total, completed=start, said="")
        if not enabled:
            return
        folder = Path(recipe.output)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        drop_after(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._boards = open_boards(folder, recipe.logging, start, recipe.model_dump(mode="json"))

    def __enter__(self) -> Self:
        self._progress.start()
        self._since = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        if self._enabled:
            # What could not be written was told when it was tried.
            with suppress(OSError) if error else nullcontext():
                self._file.close()
            for board in self._boards:
                board.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    @contextmanager
    def pause(self) -> Iterator[Pause]:
        """Do not count the time inside as training; it begins when the device has nothing left to do."""
        recorded = bool(self._pending)
        self.flush()
        asked = self._since if recorded else time.perf_counter()
        pause = Pause()
        yield pause
        pause.seconds = time.perf_counter() - asked
        self._paused += pause.seconds

    def step(self, step: int, losses: Losses, gradient_norm: Tensor, learning_rate: float, verdict: Tensor) -> None:
        """Record a training step. Its values stay on the device until lines are written, all in one transfer.

        Args:
            verdict: `Guard.check` of the step.

        Raises:
            RunError: too many steps in a row had a loss or gradient that is not a number.
        """
        scalars = [losses.tokens, gradient_norm, verdict]
        parts = [losses.sums, losses.counts, losses.dataset_sums.flatten(), losses.dataset_counts.flatten()]
        values = torch.cat([part.double() for part in (*parts, *(scalar[None] for scalar in scalars))])
        self._pending.append((step, learning_rate, values))
        if step % self._every == 0 or step == self._total:
            self.flush()
            said = describe(self._last)
            self._progress.update(self._task, completed=step, said=said)
            if not self._console.is_terminal:
                self.say(f"step {step}/{self._total}  {said}")

    def validation(
        self,
        step: int,
        loss: CrossEntropy,
        baseline: CrossEntropy | None,
        by_dataset: ByDataset | None = None,
    ) -> None:
        """Record a validation, and say it beside the baseline."""
        perplexity = {name: math.exp(min(value, 700.0)) for name, value in loss.items() if "/" not in name}
        record: dict[str, Any] = {"loss": loss.to_json(), "perplexity": perplexity}
        self.write("validation", step, record | ({"datasets": by_dataset} if by_dataset else {}))
        reference = dict(baseline.items()) if baseline else {}
        said = "  ".join(
            f"{name} {value:.3f}" + (f" (unigram {reference[name]:.3f})" if name in reference else "")
            for name, value in loss.items()
        )
        self.say(f"validation at step {step}: {said}")

    def write(self, kind: str, step: int, record: Record) -> None:
        """Write any record.

        Raises:
            DiskFullError: the disk is full; a line that was cut off is dropped when the run goes on.
        """
        if not self._enabled:
            return
        with naming_a_full_disk(self._path.parent):
            self._file.write(json.dumps({"kind": kind, "step": step} | dict(record)) + "\n")
            self._file.flush()
            values = {f"{kind}/{name}": value for name, value in _scalars(record)}
            for board in self._boards:
                board.add(step, values)

    def go_back(self, step: int) -> None:
        """Drop what was told of the steps after this one, for they are taken anew; but not that it happened before."""
        self._pending, self._not_numbers, self.spike = [], 0, None
        self._waited, self._paused, self._since = 0.0, 0.0, time.perf_counter()
        self._progress.update(self._task, completed=step)
        if not self._enabled:
            return
        self._file.close()
        drop_after(self._path, step, but=(ROLL_BACK,))
        self._file = self._path.open("a", encoding="utf-8")
        for board in self._boards:
            board.go_back(step)

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        if self._enabled:
            # A path may hold what Rich would take for markup or an emoji.
            self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        """Fetch what was recorded from the device, and write it."""
        if not self._pending:
            return
        rows = torch.stack([values for _, _, values in self._pending]).cpu().tolist()
        now = time.perf_counter()
        seconds = (now - self._since - self._paused) / len(rows)
        waited = self._waited / len(rows)
        record: dict[str, Any] = {}
        for (step, learning_rate, _), row in zip(self._pending, rows, strict=True):
            sums, counts, (*of_datasets, tokens, norm, verdict) = row[:3], row[3:6], row[6:]
            fault = _FAULTS[int(verdict)]
            by_three = [of_datasets[at : at + 3] for at in range(0, len(of_datasets), 3)]
            half = len(by_three) // 2
            by_dataset = self._datasets.means(by_three[:half], by_three[half:])
            self._not_numbers = self._not_numbers + 1 if fault == "not a number" else 0
            record = {
                "loss": {
                    name: _finite(s / n) if n else None for name, s, n in zip(MODALITIES, sums, counts, strict=True)
                },
                "datasets": {name: {m: _finite(v) for m, v in each.items()} for name, each in by_dataset.items()},
                "targets": {name: int(n) for name, n in zip(MODALITIES, counts, strict=True)},
                "learning_rate": learning_rate,
                "gradient_norm": _finite(norm),
                "tokens_per_s": tokens / seconds,
                "padding_share": 1 - tokens / self._slots,
                "data_wait_share": waited / seconds,
                "memory_gb": _memory_gb(self._device),
            }
            if self._peak_tflops:
                record["mfu"] = utilisation(self._flops_per_token, tokens / seconds, self._peak_tflops)
            if fault:
                record["fault"] = fault
                if fault == SKIPPED and self.spike is None:
                    self.spike = step, record
                self.say(f"step {step}: {fault}; losses {record['loss']}, gradient norm {norm:.3g}")
            self.write("train", step, record)
            if self._not_numbers >= self._most_not_numbers:
                raise RunError(
                    f"step {step}: the loss or its gradient is not a number for {self._not_numbers} steps in a row "
                    f"(losses {dict(zip(MODALITIES, sums, strict=True))}, gradient norm {norm}). These steps were skipped, "
                    "and the last checkpoint is whole. Lower optimizer.learning_rate, or raise schedule.warmup_steps, in a "
                    "new run."
                )
        self._last = record
        self._pending, self._waited, self._paused, self._since = [], 0.0, 0.0, now


SKIPPED = "spike, skipped"
_FAULTS = ("", "not a number", SKIPPED, "spike")
"""By `Guard.check`."""


def _memory_gb(device: torch.device) -> float:
    """The most that this process has held: of the GPU's memory where it trains on one, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _finite(value: float | None) -> float | None:
    """JSON knows no other numbers."""
    return value if value is not None and math.isfinite(value) else None


def describe(record: Record) -> str:
    """A training record in one line."""
    losses = "  ".join(f"{name} {value:.3f}" for name, value in record["loss"].items() if value is not None)
    mfu = f"  MFU {record['mfu']['full']:.1%}" if "mfu" in record else ""
    return f"{losses}  {record['tokens_per_s']:,.0f} tokens/s{mfu}  lr {record['learning_rate']:.2e}"


def drop_after(path: Path, step: int, but: Collection[str] = ()) -> None:
    """Drop the records after a step, and a last line that was cut off; for step 0 the whole file.

    Args:
        but: kinds of records that stay.

    Raises:
        RunError: a line is no record; the file is left as it was.
    """
    if not path.exists():
        return
    if step == 0:
        path.unlink()
        return
    kept = [line for line, record in _records(path) if record["step"] <= step or record["kind"] in but]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """All records of a kind: `train`, `validation`, `baseline`.

    Raises:
        RunError: a line is no record.
    """
    return [record for _, record in _records(path) if record["kind"] == kind]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and what they hold, but for a last line that was cut off."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            whole = isinstance(record["step"], int) and isinstance(record["kind"], str)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise RunError(f"{path}:{number}: damaged, no record of a run; delete that line, and start again")
        yield line, record


def _scalars(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found += _scalars({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "kind"):
            found.append((f"{prefix}{name}", float(value)))
    return found
