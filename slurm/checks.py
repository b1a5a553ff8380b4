"""What is found wrong with a job before it is submitted.

Enters: a cluster recipe, the job's folder. Leaves: nothing, or a `SubmissionError` that lists every fault at once, each with
its key, its value and what the cluster has. Always holds: the cluster's own opinion (`sbatch --test-only`) is asked last.
"""

from __future__ import annotations

import difflib
import getpass
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurm.commands import SlurmError, fields, require, run
from slurm.records import ENDED_BADLY, accounts, queue
from slurm.settings import ClusterRecipe, NodeGroup, minutes

_LOCAL = {"tmpfs", "ramfs", "overlay", "devtmpfs"}
"""File systems that no second machine can see."""


class SubmissionError(ValueError):
    """A job that the cluster would refuse or that could not start there; the message lists every fault."""


@dataclass(frozen=True, slots=True)
class _Node:
    cpus: int
    memory_mb: int
    gpus: int


def check(recipe: ClusterRecipe, folder: Path) -> None:
    """
    Args:
        folder: what the job writes to and every node must see.

    Raises:
        SubmissionError: with every fault.
        SlurmError: there is no SLURM here, or it does not answer.
    """
    for command in ("sbatch", "srun", "scontrol", "sinfo"):
        require(command)
    partitions = {
        p["PartitionName"]: p for p in map(fields, run("scontrol", "show", "partition", "-o").splitlines()) if p
    }
    faults = [*_account_faults(recipe), *_python_faults(recipe), *_folder_faults(recipe, folder)]
    for number, group in enumerate(recipe.all_groups):
        place = f"groups.{number - 1}." if number else ""
        faults += [f"{place}{fault}" for fault in _group_faults(recipe, group, partitions)]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise SubmissionError(f"{count} of the cluster recipe:\n" + "\n".join(f"  {fault}" for fault in faults))


def check_dependencies(jobs: Iterable[str]) -> None:
    """Look at the jobs that must have ended well before another one starts.

    Raises:
        SubmissionError: one has ended otherwise, so the other would never start, or is not known.
    """
    for job in jobs:
        states = _states(job)
        if not states:
            raise SubmissionError(f"after = {job}: neither the queue nor the accounting knows it; see braid jobs list")
        if ended := sorted(states & ENDED_BADLY):
            raise SubmissionError(
                f"after = {job}: it has ended as {ended[0]}, so this one would never start; first `braid jobs resume {job}`, "
                "and name the job that this gives"
            )


def _states(job: str) -> set[str]:
    """Of a job, or of the jobs of an array; of one that was queued again only the newest."""
    if live := queue(("-j", job)):
        return {record["state"] for record in live.values()}
    return {starts[-1]["state"] for starts in accounts(("-j", job)).values()}


def check_script(script: Path) -> None:
    """Ask the cluster whether it would take a script.

    Raises:
        SubmissionError: it would not, in its own words.
    """
    try:
        run("sbatch", "--test-only", str(script))
    except SlurmError as error:
        said = str(error).rpartition("sbatch: error: ")[2] or str(error)
        said = re.sub(r"^allocation failure: ", "", said)
        raise SubmissionError(f"the cluster would refuse this job: {said}; see the cluster recipe") from error


def _account_faults(recipe: ClusterRecipe) -> list[str]:
    try:
        rows = run("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos").splitlines()
        known_qos = run("sacctmgr", "-nP", "show", "qos", "format=name").split()
    except SlurmError:
        # A cluster without accounting knows no accounts; what it thinks of the recipe `sbatch --test-only` says.
        return []
    faults = []
    accounts = sorted({row.partition("|")[0] for row in rows if row})
    if recipe.account and accounts and recipe.account not in accounts:
        faults.append(f"account = {recipe.account}: {_unknown(recipe.account, accounts, 'yours are')}")
    if recipe.qos and known_qos and recipe.qos not in known_qos:
        faults.append(f"qos = {recipe.qos}: {_unknown(recipe.qos, known_qos)}")
    return faults


def _python_faults(recipe: ClusterRecipe) -> list[str]:
    interpreter = recipe.interpreter
    if interpreter is None or os.access(interpreter, os.X_OK):
        return []
    return [f"venv = {recipe.venv}: there is no {interpreter}; make it there, on a folder that the nodes see"]


def _folder_faults(recipe: ClusterRecipe, folder: Path) -> list[str]:
    kind, mount = _file_system(folder)
    if kind in _LOCAL and not recipe.assume_shared:
        return [
            f"{folder} lies on {mount}, a {kind} of this machine alone: name a folder on a file system that all nodes "
            "share; if they do share it, set assume_shared: true in the cluster recipe"
        ]
    return []


def _file_system(path: Path) -> tuple[str, str]:
    """Its type, and where it is mounted."""
    target = str(path.resolve())
    best = ("", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if (target == mount or target.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best[1]):
            best = (kind, mount)
    return best


def _group_faults(recipe: ClusterRecipe, group: NodeGroup, partitions: Mapping[str, dict[str, str]]) -> list[str]:
    name = group.partition or next((n for n, p in partitions.items() if p.get("Default") == "YES"), None)
    if name is None:
        return [f"partition: the cluster has no default; name one of {_listed(partitions)}"]
    if name not in partitions:
        return [f"partition = {name}: {_unknown(name, partitions)}"]
    return [*_limit_faults(recipe, name, partitions[name]), *_size_faults(group, name, partitions[name])]


def _limit_faults(recipe: ClusterRecipe, name: str, partition: dict[str, str]) -> list[str]:
    faults = []
    if partition.get("State") not in (None, "UP"):
        faults.append(f"partition = {name}: it is {partition['State']}; wait, or take another one")
    limit = partition.get("MaxTime", "UNLIMITED")
    if limit not in ("UNLIMITED", "INFINITE") and minutes(recipe.time) > minutes(limit):
        faults.append(
            f"time = {recipe.time}: partition {name} allows at most {limit}; set time to that, jobs go on by themselves"
        )
    allowed = partition.get("AllowAccounts", "ALL")
    if recipe.account and allowed != "ALL" and recipe.account not in allowed.split(","):
        faults.append(f"account = {recipe.account}: partition {name} allows {allowed}")
    return faults


def _size_faults(group: NodeGroup, name: str, partition: dict[str, str]) -> list[str]:
    faults = []
    nodes = _nodes(name)
    most = partition.get("MaxNodes", "UNLIMITED")
    count = min(len(nodes), int(most)) if most.isdigit() else len(nodes)
    if group.nodes > count:
        faults.append(f"nodes = {group.nodes}: partition {name} gives at most {count}")
    memory_mb = int((group.memory_gb or 0) * 1024)
    wants = (
        ("gpus_per_node", group.gpus_per_node, [n.gpus for n in nodes], "GPUs"),
        ("tasks_per_node x cpus_per_task", group.cpus, [n.cpus for n in nodes], "CPUs"),
        ("memory_gb", memory_mb, [n.memory_mb for n in nodes], "MB of memory"),
    )
    for key, wanted, there, what in wants:
        largest, said = max(there, default=0), group.memory_gb if key == "memory_gb" else wanted
        if wanted > largest:
            faults.append(f"{key} = {said}: no node of partition {name} has more than {largest} {what}")
        elif (fitting := sum(has >= wanted for has in there)) < group.nodes <= count:
            faults.append(f"{key} = {said}: only {fitting} nodes of partition {name} have so many {what}")
    return faults


def _nodes(partition: str) -> list[_Node]:
    found = {}
    for line in run("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G").splitlines():
        node, cpus, memory, gres = line.split("|")
        found[node] = _Node(int(cpus.rstrip("+")), int(memory.rstrip("+")), _gpus(gres))
    return list(found.values())


def _gpus(gres: str) -> int:
    """Of `gpu:h100:8(S:0-1),nvme:1`."""
    total = 0
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = item.split(":")
        if parts[0] == "gpu":
            total += int(parts[-1]) if parts[-1].isdigit() else 1
    return total


def _unknown(name: str, known: Iterable[str], are: str = "there are") -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"unknown; did you mean {near[0]}?" if near else f"unknown; {are} {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
