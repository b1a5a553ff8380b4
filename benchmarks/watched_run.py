"""A pretraining run in processes of its own, watched from outside.

Enters: a recipe with overrides, the number of ranks. Leaves: its records with the time at which each was seen, when each
checkpoint was whole, what it said. Always holds: the processes are gone when `watch` returns, however that goes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.pretrain.checkpoint import list_checkpoints, step_of

ENVIRONMENT = {
    # Multicast needs what not every host grants, and NCCL then fails at the first collective.
    "NCCL_NVLS_ENABLE": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
}
_LOOK_S = 0.02
"""Between two looks: how exact the times are."""


class Watched:
    """One run."""

    def __init__(self, recipe: list[str], folder: Path, ranks: int, rows: int) -> None:
        """
        Args:
            recipe: its name, and overrides.
            folder: its `output`.
            rows: of a micro-batch, to be told.
        """
        self.recipe, self.folder, self.ranks, self.rows = recipe, folder, ranks, rows
        self.steps: list[dict[str, Any]] = []
        self.saves: list[dict[str, Any]] = []
        self.whole_after_s: dict[int, float] = {}
        """By step: from the end of the pause to the moment when the checkpoint had its name."""
        self.bytes_of: dict[int, int] = {}
        self.fault = ""
        """Why it ended before it should, for who keeps what it has told."""
        self.first_step_s = 0.0
        """From the start of the process to the first record."""
        self._seen: dict[tuple[str, int], float] = {}
        self._log = folder.with_name(f"{folder.name}-{ranks}.log")
        self._read = 0

    def watch(self, *, steps: int, saves: int, limit_s: float, goes_on_from: int = 0) -> None:
        """Run until so many steps are taken and so many checkpoints are whole.

        Args:
            goes_on_from: the step of a checkpoint that is there; steps are counted from the run's beginning.

        Raises:
            RuntimeError: it ended by itself, did not go on from there, or took longer than the limit; with its last words.
        """
        if not goes_on_from:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._log.unlink(missing_ok=True)
        began = time.perf_counter()
        processes = self._start()
        try:
            while not self._done(steps, saves):
                if ended := [process.returncode for process in processes if process.poll() is not None]:
                    raise RuntimeError(f"ended by itself with {ended[0]}: {self._tail()}")
                if time.perf_counter() - began > limit_s:
                    raise RuntimeError(f"over its limit of {limit_s:.0f} s: {self._tail()}")
                time.sleep(_LOOK_S)
                # A run that goes on has dropped the records of steps that it takes anew before it says so.
                if not goes_on_from or self.said(f"Going on from step {goes_on_from:,} of"):
                    self._look(began, goes_on_from)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()

    def _start(self) -> list[subprocess.Popen[bytes]]:
        """Its ranks, as `srun` starts them: torchrun's are in sessions of their own, and outlive it when it is killed."""
        command = [sys.executable, "-m", "pipelines.cli", "pretrain", *self.recipe]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(self.ranks):
            named = {
                "RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            }  # fmt: skip
            environment = os.environ | ENVIRONMENT | (named if self.ranks > 1 else {})
            with self._log.open("ab") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return processes

    def _done(self, steps: int, saves: int) -> bool:
        return bool(self.steps) and self.steps[-1]["step"] >= steps and len(self.whole_after_s) >= saves

    def _look(self, began: float, after: int) -> None:
        now, metrics = time.perf_counter(), self.folder / "metrics.jsonl"
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                record = json.loads(line)
                if record["step"] <= after:
                    continue
                self._seen[record["kind"], record["step"]] = now
                if record["kind"] == "train":
                    self.first_step_s = self.first_step_s or now - began
                    self.steps.append(record)
                elif record["kind"] == "save":
                    self.saves.append(record)
        for path in list_checkpoints(self.folder / "checkpoints"):
            step = step_of(path)
            if step not in self.whole_after_s and ("save", step) in self._seen:
                self.whole_after_s[step] = now - self._seen["save", step]
                self.bytes_of[step] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    def losses(self, *, after: int, until: int) -> dict[int, dict[str, float]]:
        """By step and modality; it may have taken more steps before it was stopped."""
        return {r["step"]: r["loss"] for r in self.steps if after < r["step"] <= until}

    def data_wait(self, after: int) -> float:
        """Share of the time of all steps together in which training waited for data."""
        # A step's seconds are its tokens over its speed, and tokens are what is not padding.
        steps = [r for r in self.steps if r["step"] > after]
        seconds = [(1 - r["padding_share"]) / r["tokens_per_s"] for r in steps]
        return sum(r["data_wait_share"] * s for r, s in zip(steps, seconds, strict=True)) / sum(seconds)

    def speed_while_writing(self, after: int) -> int | None:
        """Median tokens/s of the steps that a checkpoint was written beside; None if there are none."""
        spans = []
        for step, took in self.whole_after_s.items():
            start = self._seen["save", step]
            spans.append((start, start + took))
        beside = [
            r["tokens_per_s"]
            for r in self.steps
            if r["step"] > after and any(a < self._seen["train", r["step"]] <= b for a, b in spans)
        ]
        return round(statistics.median(beside)) if beside else None

    def said(self, words: str) -> str | None:
        """The first line with these words."""
        if not self._log.exists():
            return None
        return next((line for line in self._log.read_text(errors="replace").splitlines() if words in line), None)

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]
