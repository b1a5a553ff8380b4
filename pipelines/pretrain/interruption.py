"""A run that is told to stop: by SLURM before its time is over or somebody else's turn comes, or by a user's TERM.

Enters: the signals USR2 and TERM, on any rank, at any moment. Leaves: one decision of all ranks at a step boundary. Always
holds: a handler only sets a flag, because a collective save from within one would wait for ranks that are elsewhere; on a
cluster the job is queued again with the same run folder; ranks whose peers are gone say so, apart from faults of their own.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

import slurm.context
from pipelines.pretrain.parallelize import Ranks
from pipelines.pretrain.run import RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""The later one says more: SLURM sends USR2 ahead of time, and may send TERM before that is acted upon."""

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Connection refused")
"""How gloo, which has no error of its own, says that a rank has ended."""


class InterruptedRunError(RunError):
    """The run was told to stop, and has saved before it did."""


class Interruption:
    """Whether a run is to stop; a context manager that listens to the signals."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._before: dict[int, Any] = {}
        self._received = 0
        """The place in `SIGNALS` of the one that says most, counted from 1."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if job := slurm.context.current():
            # It may have come while torch was being imported.
            for number in SIGNALS:
                if number in job.signals:
                    self._note(number, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, 1 + SIGNALS.index(signal.Signals(number)))

    def agreed(self) -> bool:
        """Whether any rank was told to stop; every rank must ask, after every step."""
        if self._ranks.world_size > 1:
            # On the CPU, so that nobody waits for a GPU: the group has gloo for it beside NCCL.
            told = torch.tensor(self._received)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            self._received = int(told)
        return bool(self._received)

    def stop(self, step: int) -> None:
        """End the run, which has saved after this step; on a cluster its job is queued again.

        Raises:
            InterruptedRunError: always.
        """
        name = SIGNALS[self._received - 1].name
        if job := slurm.context.current():
            job.requeue(f"{name}: saved after step {step}")
        raise InterruptedRunError(f"stopped by {name}, saved after step {step:,}; the same command goes on from there")


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Tell the end of other ranks from faults of this one.

    Raises:
        LostRanksError: instead of what the communication between ranks raises when one of them is gone.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError) as error:
        raise slurm.context.LostRanksError(str(error)) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _GONE):
            raise slurm.context.LostRanksError(str(error)) from error
        raise
