"""Saving while training goes on.

Enters: a `Checkpoint`, model and optimizer, at a step boundary. Leaves: a checkpoint, some steps later; on request its
weights as a model of its own. Always holds: training waits only while weights and moments are copied to host memory; one
checkpoint is written at a time; what could not be written is said, and ends the run when it happens twice in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from pipelines.pretrain.checkpoint import (
    Checkpoint,
    SaveError,
    prune_checkpoints,
    state_of,
    write_checkpoint,
)
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.pretrain.recipe import CheckpointSettings
from pipelines.shards.storage import DiskFullError


class Saver:
    """Writes the checkpoints of a run on a thread of its own; every rank has one, and calls it at the same steps."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        ranks: Ranks,
        say: Callable[[str], None],
        after: Callable[[Path], None] | None = None,
        protected: Callable[[int], int | None] = lambda step: None,
    ) -> None:
        """
        Args:
            folder: of the checkpoints.
            say: tells people what went wrong; called on the first rank.
            after: called on the first rank with each finished checkpoint, off the critical path.
            protected: which step's checkpoint must stay when that of a step was written.
        """
        self._folder, self._settings, self._ranks = folder, settings, ranks
        self._say, self._after, self._protected = say, after, protected
        # A group of its own, because the thread must not come between the collectives of the training step.
        self._group = dist.new_group(backend="gloo")
        # The cache is page-locked memory, which makes copies several times as fast.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=ranks.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="braid-saver")
        self._running: Future[Path] | None = None
        self._failed = 0

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

    def save(self, checkpoint: Checkpoint, model: ShardedTransformer, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write a checkpoint; the one before it is waited for.

        Raises:
            DiskFullError, SaveError: two in a row could not be written.
        """
        self.wait()
        staged: Any = self._stager.stage(state_of(model, optimizer))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._running = self._thread.submit(self._write, checkpoint, staged)
        if not self._settings.asynchronous:
            self.wait()

    def wait(self, *, last: bool = False) -> None:
        """Wait until everything is written.

        Args:
            last: nothing will be saved after it, so that a failure ends the run at once.
        """
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            running.result()
            self._failed = 0
        except (DiskFullError, SaveError) as error:
            self._failed += 1
            if last or self._failed > 1:
                raise
            if self._ranks.first:
                self._say(f"NOT SAVED: {error}. The run goes on, and stops if the next one cannot be saved either.")

    def _write(self, checkpoint: Checkpoint, staged: dict[str, Any]) -> Path:
        path = write_checkpoint(self._folder, checkpoint, staged, self._ranks, self._group)
        protected = self._protected(checkpoint.step)
        prune_checkpoints(self._folder, self._settings.keep, self._ranks, self._settings.keep_every, protected)
        if self._after is not None and self._ranks.first:
            self._after(path)
        return path
