"""What a cluster recipe says: where a job runs, what it takes there, and what makes its Python ready.

Enters: `configs/cluster/*.yaml`, read by whoever submits. Leaves: frozen, validated settings. Always holds: nothing here
decides what a job computes, so a run may go on with other cluster settings.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")

_OURS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "time": "time",
    "nodes": "nodes",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory_gb",
    "signal": "signal_before_s",
    "export": "environment",
}
"""Options of sbatch that have a key of their own."""

_FIXED = {
    "array",
    "chdir",
    "dependency",
    "error",
    "job-name",
    "kill-on-invalid-dep",
    "no-kill",
    "open-mode",
    "output",
    "requeue",
    "no-requeue",
    "wait",
    "parsable",
}
"""Options that Braid sets, because what it promises of a job rests on them."""


class _Section(BaseModel):
    """Unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class NodeGroup(_Section):
    """Nodes of one kind."""

    partition: str | None = None
    """null is the cluster's default."""
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    """Training processes of a node; null is one for each GPU, or one."""
    cpus_per_task: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    """Of each node; null is the cluster's default."""
    sbatch: dict[str, str | int | bool] = {}
    """More options of sbatch, without dashes before them: `exclusive: true`, `constraint: ib`."""

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name in value:
            plain = name.lstrip("-").replace("_", "-")
            if plain in _OURS:
                raise ValueError(f"{name} has a key of its own here: write {_OURS[plain]}")
            if plain in _FIXED:
                raise ValueError(f"{name} is set by Braid; leave it out")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", plain):
                raise ValueError(f"{name!r} is no option of sbatch; write it without dashes before it")
        return value

    @property
    def tasks(self) -> int:
        """Tasks of one node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def cpus(self) -> int:
        """Of one node."""
        return self.tasks * self.cpus_per_task

    @property
    def memory(self) -> str | None:
        """Of one node, as sbatch reads it."""
        return f"{int(self.memory_gb * 1024)}M" if self.memory_gb else None

    @property
    def options(self) -> dict[str, str | int | bool]:
        """`sbatch`, as it is written there; a switch that is off is no option at all."""
        named = {name.lstrip("-").replace("_", "-"): value for name, value in self.sbatch.items()}
        return {name: value for name, value in named.items() if value is not False}


class ClusterRecipe(NodeGroup):
    """Where and how a job runs."""

    account: str | None = None
    """null is the user's default."""
    qos: str | None = None
    time: int | str = "1-00:00:00"
    """The most that a job runs before it is stopped, saves and queues again: `minutes`, `hours:minutes:seconds` or
    `days-hours:minutes:seconds`."""
    groups: tuple[NodeGroup, ...] = ()
    """More nodes of the same job, of other kinds, for tokenization: its first node is one of those above."""
    venv: str | None = None
    """A virtual environment that the nodes see; null is the Python that submits."""
    container: str | None = None
    """A command that the Python of each task is put behind, such as `apptainer exec --nv image.sif`. With it `venv` is a
    path inside, and null is `python3` there."""
    setup: tuple[str, ...] = ()
    """Lines of shell that the job begins with, such as `module load cuda`."""
    environment: dict[str, str] = {}
    """Variables of the job, such as `NCCL_SOCKET_IFNAME`."""
    srun: tuple[str, ...] = ()
    """More arguments of srun, with their dashes."""
    jobs: str | None = None
    """Folder that the folders of jobs are made in; null is `jobs/` in the run's folder, or in the dataset's."""
    assume_shared: bool = False
    """Submit even where the job's folder lies on a file system that looks like one of this machine alone."""
    signal_before_s: int = Field(120, ge=5)
    """How long before its end a job is told to save: more than a step and a checkpoint take."""
    lost_rank_restarts: int = Field(3, ge=0)
    """How often a job is queued again when tasks were lost and none said why, as with a dead node or network."""

    @field_validator("time")
    @classmethod
    def _time(cls, value: int | str) -> int | str:
        minutes(value)
        return value

    @field_validator("environment")
    @classmethod
    def _environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable")
        return value

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.signal_before_s > minutes(self.time) * 60 / 2:
            raise ValueError(
                f"signal_before_s = {self.signal_before_s} is more than half of time = {self.time}: the job would save "
                "more than it works; raise time or lower signal_before_s"
            )
        return self

    @property
    def whole_minutes(self) -> int:
        """`time` as sbatch takes it; an odd second is given away."""
        return max(1, int(minutes(self.time)))

    @property
    def all_groups(self) -> tuple[NodeGroup, ...]:
        """The nodes of all kinds, those that the recipe itself describes first."""
        return (self, *self.groups)

    @property
    def python(self) -> str:
        """The command, for a shell, that runs Python on a node."""
        if self.container:
            inside = f"{self.venv}/bin/python" if self.venv else "python3"
            return f"{self.container} {shlex.quote(inside)}"
        return shlex.quote(str(self.interpreter))

    @property
    def interpreter(self) -> Path | None:
        """The file that must be there on every node; None in a container."""
        if self.container:
            return None
        # Not resolved: a virtual environment is found by the name of the link.
        return Path(self.venv, "bin/python") if self.venv else Path(sys.executable)

    @property
    def gpu_hours(self) -> float:
        """The most that one start can use."""
        return sum(group.nodes * group.gpus_per_node for group in self.all_groups) * minutes(self.time) / 60


def minutes(time: int | str) -> float:
    """A time as sbatch reads it.

    Raises:
        ValueError: it is none.
    """
    found = _TIME.fullmatch(str(time).strip())
    if not found:
        raise ValueError(f"{time!r} is no time; write 90 (minutes), 1:30:00 or 2-00:00:00")
    days, *parts = found.groups()
    numbers = [int(part or 0) for part in parts]
    if days:
        # days-hours[:minutes[:seconds]]
        total = int(days) * 1440 + numbers[0] * 60 + numbers[1] + numbers[2] / 60
    elif parts[1] is None:
        total = float(numbers[0])
    elif parts[2] is None:
        # minutes:seconds
        total = numbers[0] + numbers[1] / 60
    else:
        total = numbers[0] * 60 + numbers[1] + numbers[2] / 60
    if total <= 0:
        raise ValueError("a job needs more time than 0")
    return total
