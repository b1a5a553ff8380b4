"""Saving while training goes on.

Enters: a `Checkpoint`, model and optimizer, at a step boundary. Leaves: a checkpoint, some steps later; on request its
weights as a model of its own. Always holds: training waits only while weights and moments are copied to host memory, and
for the checkpoint before where that is still being written; one checkpoint is written at a time; what could not be written is
said, and ends the run when it happens twice in a row or at the end; what fails when a checkpoint is whole is only said.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from pipelines.pretrain.checkpoint import (
    Checkpoint,
    SaveError,
    prune_checkpoints,
    state_of,
    step_of,
    write_checkpoint,
)
from pipelines.pretrain.mirror import Copying
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.pretrain.recipe import CheckpointSettings
from pipelines.pretrain.staging import Staging
from pipelines.shards.storage import DiskFullError


class Saver:
    """Writes the checkpoints of a run on a thread of its own; every rank has one, and calls it at the same steps."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        ranks: Ranks,
        say: Callable[[str], None],
        copying: Copying,
        export: Callable[[Path], None] | None,
        protected: Callable[[int], set[int]],
    ) -> None:
        """
        Args:
            folder: of the checkpoints.
            say: tells people what went wrong; called on the first rank.
            copying: is given each finished checkpoint.
            export: called on the first rank with each finished checkpoint, off the critical path.
            protected: which steps' checkpoints must stay when that of a step was written.
        """
        self._folder, self._settings, self._ranks = folder, settings, ranks
        self._say, self._copying, self._protected = say, copying, protected
        self._afterwards: dict[str, Callable[[Path], None]] = {
            "pruned": self._prune,
            **({"exported": export} if export else {}),
            "mirrored": copying.add,
        }
        """What the first rank does with each finished checkpoint, by the word for it."""
        # A group of its own, because the thread must not come between the collectives of the training step.
        self._group = dist.new_group(backend="gloo")
        # Where training waits for the writing anyway, memory that is locked all the while would gain nothing.
        self._staging = Staging(ranks.device, page_locked=ranks.device.type == "cuda" and settings.asynchronous)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="braid-saver")
        self._running: Future[Path] | None = None
        self._failed: list[DiskFullError | SaveError] = []
        """Why the last checkpoints could not be saved; none if the last one could."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait(last=True)
            elif self._running is not None:
                # What is on its way is worth having, whatever ended the run.
                self._running.exception()
        finally:
            self._thread.shutdown()

    @property
    def unprepared(self) -> bool:
        """Whether the first save would take seconds longer than the others: call `prepare` before."""
        return not self._staging.ready

    def prepare(self, model: ShardedTransformer, optimizer: torch.optim.Optimizer) -> None:
        """Get the page-locked memory of all saves, once the optimizer has its moments; every rank must call it.

        Between two steps, and not on a thread while they are taken: the driver may let all work on the device come to its
        end before it locks pages. Kernels of NCCL that wait for another rank, whose driver does the same, would never.
        """
        if self._staging.ready:
            return
        began = time.perf_counter()
        size, fault = 0, ""
        try:
            size = self._staging.lock(state_of(model, optimizer))
        except (RuntimeError, OSError) as error:
            fault = f"rank {self._ranks.rank}: {error}"
        outcomes: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(outcomes, (size, fault), group=self._group)
        if not self._ranks.first:
            return
        took = time.perf_counter() - began
        self._say(
            f"checkpoints: {sum(size for size, _ in outcomes) / 1e9:,.1f} GB of host memory page-locked for them, on all "
            f"ranks together, in {took:.1f} s"
        )
        if faults := [fault for _, fault in outcomes if fault]:
            self._say(
                f"NO PAGE-LOCKED MEMORY for checkpoints on {len(faults)} of {len(outcomes)} ranks ({faults[0]}): each save "
                "pauses training several times as long. Give the job more memory, or use more GPUs."
            )

    def save(self, checkpoint: Checkpoint, model: ShardedTransformer, optimizer: torch.optim.Optimizer) -> float:
        """Begin to write a checkpoint; the one before it is waited for.

        Returns:
            Seconds that the one before it was waited for.

        Raises:
            DiskFullError, SaveError: two in a row could not be written.
        """
        asked = time.perf_counter()
        self.wait()
        waited = time.perf_counter() - asked
        staged = self._staging.copy(state_of(model, optimizer))
        self._running = self._thread.submit(self._write, checkpoint, staged)
        if not self._settings.asynchronous:
            self.wait()
        return waited

    def wait(self, *, last: bool = False) -> None:
        """Wait until everything is written.

        Args:
            last: nothing will be saved after it, so that a failure ends the run at once.
        """
        if self._running is not None:
            running, self._running = self._running, None
            try:
                running.result()
                self._failed.clear()
            except (DiskFullError, SaveError) as error:
                self._failed.append(error)
                if self._ranks.first and len(self._failed) == 1 and not last:
                    self._say(f"NOT SAVED: {error}. The run goes on, and stops if the next one cannot be saved either.")
        if len(self._failed) > 1 or (last and self._failed):
            raise self._failed[-1]

    def settle(self, *, last: bool = False, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until everything is written, and copied too; every rank must call it.

        Args:
            last: see `wait`.
            alive: called now and then while copies are waited for.
        """
        self.wait(last=last)
        self._copying.settle(self._ranks, alive)

    def _write(self, checkpoint: Checkpoint, staged: dict[str, Any]) -> Path:
        path = write_checkpoint(self._folder, checkpoint, staged, self._ranks, self._group)
        for what, work in self._afterwards.items() if self._ranks.first else ():
            try:
                work(path)
            except (OSError, DiskFullError) as error:
                self._say(f"NOT {what.upper()}: {path.name}: {error}. The checkpoint is whole in {path.parent}.")
        return path

    def _prune(self, newest: Path) -> None:
        protected = self._protected(step_of(newest)) | self._copying.steps
        prune_checkpoints(self._folder, self._settings.keep, self._settings.keep_every, protected)
