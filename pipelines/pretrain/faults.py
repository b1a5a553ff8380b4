"""Steps that would do harm are skipped, and runs that hang are ended.

Enters: losses and gradient norm of each step, on the device. Leaves: for the optimizer, whether to take the step; for a
person, why a run was stopped. Always holds: the host never waits for the device; all ranks decide alike, because they
decide from values that are summed over all of them; and a run that was killed and went on skips the same steps as an
undisturbed one.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from model import MODALITIES
from pipelines.pretrain.recipe import FaultSettings
from pipelines.pretrain.step import Losses

_MEMORY = 0.98
"""Of the running mean and variance: about the last fifty steps."""

_LEARNING = 50
"""Steps before a loss is called a spike: until then it falls too fast for its spread to mean much."""


class Guard:
    """Decides for each step whether its gradients are used."""

    def __init__(self, settings: FaultSettings, device: torch.device) -> None:
        self._settings = settings
        count = len(MODALITIES)
        self._mean = torch.zeros(count, dtype=torch.float64, device=device)
        self._variance = torch.zeros(count, dtype=torch.float64, device=device)
        self._seen = torch.zeros(count, dtype=torch.float64, device=device)
        self.roll_backs = 0
        """Times that the run went back to its last regular checkpoint."""

    def check(self, losses: Losses, gradient_norm: Tensor) -> Tensor:
        """Whether to take the coming step.

        Returns:
            float32 scalar on the device: 0 take it, 1 something is not a number, 2 a modality's loss is a spike and is
            skipped, 3 it is a spike and is only recorded.
        """
        present = losses.counts > 0
        means = losses.sums / losses.counts.clamp(min=1)
        broken = ~(torch.isfinite(means).all() & torch.isfinite(gradient_norm))
        deviation = means - self._mean
        known = present & (self._seen >= _LEARNING)
        spike = (known & (deviation > self._settings.spike_sigmas * self._variance.sqrt())).any() & ~broken
        self._learn(present & ~broken & ~spike, deviation)
        kind = 3.0 if self._settings.spikes == "record" else 2.0
        return torch.where(broken, 1.0, torch.where(spike, kind, 0.0)).to(torch.float32)

    def _learn(self, learned: Tensor, deviation: Tensor) -> None:
        self._seen += learned
        # As many steps weigh as there were, until there are enough.
        rate = torch.maximum(1 / self._seen.clamp(min=1), torch.full_like(self._seen, 1 - _MEMORY))
        step = torch.where(learned, rate * deviation, 0.0)
        self._mean += step
        self._variance = torch.where(
            learned, (1 - rate) * (self._variance + torch.where(learned, deviation, 0.0) * step), self._variance
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint, exact."""
        return {
            "mean": self._mean.tolist(),
            "variance": self._variance.tolist(),
            "seen": self._seen.tolist(),
            "roll_backs": self.roll_backs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("mean", "variance", "seen"):
            getattr(self, f"_{name}").copy_(torch.tensor(state[name], dtype=torch.float64))
        # Checkpoints before there was going back have no count.
        self.roll_backs = state.get("roll_backs", 0)


def take_step(optimizer: torch.optim.Optimizer, verdict: Tensor) -> None:
    """Step, unless `Guard.check` forbids it: then weights, moments and step count stay as they are."""
    skip = (verdict == 1) | (verdict == 2)
    if all(group.get("fused") for group in optimizer.param_groups) or getattr(optimizer, "heeds_found_inf", False):
        # What gradient scalers tell optimizers, which then decide on the device.
        optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(skip):
        # Others have to be held back from here, for which the host has to know.
        optimizer.step()


class Watchdog:
    """Ends a rank that takes longer than it may for one step, its stacks written down.

    Where one rank hangs, the others wait for it and are ended, too: the launcher then starts all of them again. The timer is
    the interpreter's own thread below Python, so that it also fires while Python's lock is held.
    """

    def __init__(self, folder: Path, settings: FaultSettings, rank: int) -> None:
        self._timeout_s = settings.hang_s
        self._path = folder / ".stacks" / f"rank-{rank}.txt"
        self._file: Any = None

    def __enter__(self) -> Self:
        if self._timeout_s:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w")
            self.alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink(missing_ok=True)

    def alive(self) -> None:
        """Begin to count anew; to be called after every step, validation and checkpoint."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._timeout_s, file=self._file, exit=True)


def stacks_left(folder: Path) -> list[Path]:
    """Where the ranks of a run that hung have written their stacks, moved to RUN/stacks/ for people to read."""
    left = [path for path in sorted((folder / ".stacks").glob("rank-*.txt")) if path.stat().st_size]
    moved = []
    for path in left:
        target = folder / "stacks" / f"{path.stem}-{int(path.stat().st_mtime)}-{os.getpid()}.txt"
        target.parent.mkdir(exist_ok=True)
        moved.append(path.rename(target))
    return moved
