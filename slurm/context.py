"""What a callable may know and ask for when it runs as a task of a job.

Enters: SLURM's variables in a task that `slurm.entry` has started. Leaves: `current()`. Always holds: a wish to be queued
again is a file in the job's folder, named by the attempt; the job's script acts on it when all tasks have ended, outside of
any container, and not if the job was cancelled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "BRAID_JOB_FOLDER"


class LostRanksError(RuntimeError):
    """Other tasks of the job no longer answer, and this one has no fault: it is queued again, a bounded number of times."""


@dataclass
class JobContext:
    """A task of a job."""

    id: str
    """As users name it: of a task of an array `ARRAY_INDEX`."""
    folder: Path
    restarts: int
    """How often the job was queued again before."""
    rank: int
    world_size: int
    signals: set[int] = field(default_factory=set)
    """That came so far, until the callable has handlers of its own."""
    requeued: str = field(default="", init=False)
    """Why `requeue` was called; "" if it was not."""

    @property
    def attempt(self) -> str:
        """Names this start of the job among all."""
        return f"{self.id}-{self.restarts}"

    def requeue(self, why: str) -> None:
        """Have the job queued again, with the same folder, when its tasks have ended; every task should call it and return.

        Args:
            why: for whoever reads how the job went.
        """
        self.requeued = why
        if self.rank == 0:
            self.write("requeue", {"why": why})

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Leave a record of this attempt: whole or absent."""
        write_record(self.folder / f"{kind}-{self.attempt}.json", record)


def current() -> JobContext | None:
    """The task that this process is; None outside of a job."""
    return _current


def enter() -> JobContext:
    """Become the task that the environment names."""
    global _current
    environment = os.environ
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    _current = JobContext(
        id=f"{array}_{index}" if array else environment["SLURM_JOB_ID"],
        folder=Path(environment[FOLDER_VARIABLE]),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        rank=int(environment.get("SLURM_PROCID", "0")),
        world_size=int(environment.get("SLURM_NTASKS", "1")),
    )
    return _current


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write JSON by one rename."""
    partial = file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(file)


_current: JobContext | None = None
