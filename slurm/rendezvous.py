"""How tasks find each other: SLURM's variables turned into those that `torch.distributed` reads.

Enters: the environment of a task that srun started. Leaves: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
`MASTER_PORT`. Always holds: no task asks another one; jobs that share a node, and starts of one job, use different ports.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 12000, 20000
"""Below those that the kernel gives to outgoing connections (32768 and up)."""


def join(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what `torch.distributed` needs, from what srun has set."""
    first = hosts(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])[0]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment.get("SLURM_NTASKS_PER_NODE", "1")
    environment["MASTER_ADDR"] = first
    environment["MASTER_PORT"] = str(port(environment))


def port(environment: MutableMapping[str, str] = os.environ, offset: int = 0) -> int:
    """A port that follows from the job and its start, so that every task computes it alone.

    Args:
        offset: 0 to 9, for jobs that need several.
    """
    job, restarts = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_RESTART_COUNT", "0"))
    # Ten for each start: a port of the start before may still be waiting to be closed.
    return FIRST_PORT + (job * 50 + restarts % 5 * 10 + offset) % PORTS


def hosts(names: str) -> list[str]:
    """The names in a list of nodes such as `a[1-3,07],b`, in order."""
    found: list[str] = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", names):
        expanded = [""]
        for literal, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", group):
            endings = [literal] if literal else [n for part in inside.split(",") for n in _range(part)]
            expanded = [start + end for start in expanded for end in endings]
        found += expanded
    return found


def _range(part: str) -> list[str]:
    first, dash, last = part.partition("-")
    return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)] if dash else [part]
