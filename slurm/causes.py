"""Why a job waits or why it ended, in one sentence with the remedy.

Enters: SLURM's words and the records in a job's folder. Leaves: sentences. Always holds: what a task has said of its own
fault comes before what SLURM says of the job; "" means that nothing is known beyond the state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm.commands import fields

_WAITING = {
    "Priority": "other jobs come first; it starts when it is its turn",
    "Resources": "it is the next one, and waits for nodes to become free",
    "Dependency": "it waits for the jobs that it comes after",
    "DependencyNeverSatisfied": "a job that it comes after has failed, so it will never start: braid jobs cancel it",
    "BeginTime": "it was queued again, and may start in some minutes",
    "JobHeldUser": "it is held: scontrol release it",
    "JobHeldAdmin": "an administrator, or SLURM after a failed start, holds it: ask, then scontrol release it",
    "launch failed requeued held": "a node could not start it, and SLURM holds it: scontrol release it",
    "PartitionTimeLimit": "its time is over the limit of the partition: cancel it, and submit with a lower time",
    "PartitionNodeLimit": "it wants more nodes than the partition has: cancel it, and submit with fewer",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": "nodes that it needs are "
    "down, drained, or taken by a partition of higher priority",
    "AssociationJobLimit": "the account has reached its number of jobs",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as the QOS allows",
    "QOSMaxGRESPerUser": "you use as many GPUs as the QOS allows",
    "QOSGrpGRES": "all GPUs of the QOS are in use",
    "AssocGrpGRES": "all GPUs of the account are in use",
    "AssocMaxJobsLimit": "the account has as many jobs running as it may have",
    "InvalidAccount": "the account may not run here: cancel it, and submit with another one",
    "InvalidQOS": "the QOS does not exist any more: cancel it, and submit with another one",
}

_ENDS = {
    "NODE_FAIL": "a node failed",
    "PREEMPTED": "a job of higher priority took its nodes",
    "OUT_OF_MEMORY": "out of memory; raise memory_gb in the cluster recipe, or lower batch.micro_batch or the workers",
    "TIMEOUT": "its time was over before it had saved; raise signal_before_s in the cluster recipe, then braid jobs resume",
    "DEADLINE": "its deadline was over",
    "BOOT_FAIL": "a node did not boot; braid jobs resume",
    "REQUEUED": "it was taken back (scontrol requeue)",
    "UNKNOWN": "SLURM has no record of how it ended",
}

_FULL = ("No space left on device", "Disk quota exceeded")


def of_waiting(reason: str) -> str:
    """Why a job is pending."""
    reason = reason.strip("()")
    if reason in ("", "None"):
        return "it has just been queued"
    return f"{reason}: {_WAITING[reason]}" if reason in _WAITING else reason


def without_a_start(folder: Path, state: str, reason: str) -> str:
    """Why a job ended that never ran."""
    if state == "CANCELLED":
        if reason in ("Dependency", "DependencyNeverSatisfied"):
            return "a job that it was to come after has failed"
        return "it was cancelled before it started"
    return _ENDS.get(state, "")


def of_an_end(folder: Path, attempt: str, state: str) -> str:
    """Why one start of a job ended, other than well."""
    faults = sorted(_records(folder, f"fault-{attempt}-*.json"), key=lambda r: float(r.get("at", 0)))
    if faults:
        return _of_a_fault(faults[0])
    if (wish := next(iter(_records(folder, f"requeue-{attempt}.json")), None)) and state != "CANCELLED":
        return f"{_of_a_requeue(folder, attempt, state)}; {wish.get('why', '')}"
    if state == "CANCELLED":
        return "it was cancelled"
    lost = list(_records(folder, f"lost-{attempt}-*.json"))
    if state in ("FAILED", "REQUEUED") and (lost or attempt in _losses(folder, attempt)):
        return (
            "tasks were lost, and none says why: a killed process, a dead node or network; if it goes on, look at the logs "
            "and at memory_gb, then braid jobs resume"
        )
    if state == "FAILED" and not list(folder.glob(f"{attempt.rpartition('-')[0]}_*_log.out")):
        return (
            f"its node could not write to {folder}: the nodes do not see this folder; name one on a file system that all "
            "of them share (slurm.jobs, or the output), and submit again"
        )
    if state == "FAILED":
        return "its script failed before a task began; see braid jobs logs"
    return _ENDS.get(state, "")


def _of_a_fault(record: Mapping[str, Any]) -> str:
    message = " ".join(str(record.get("message") or record.get("error", "")).split())
    if any(words in message for words in _FULL):
        return f"the disk is full: {message}; free some space, then braid jobs resume"
    where = f" (task {record['rank']} on {record['node']})" if "rank" in record else ""
    name = str(record.get("error", ""))
    # Braid's own errors are whole sentences.
    own = str(record.get("module", "")).partition(".")[0] in ("model", "pipelines", "slurm") or "module" not in record
    return f"{message}{where}" if own else f"{name}: {message}{where}; see braid jobs logs"


def _of_a_requeue(folder: Path, attempt: str, state: str) -> str:
    """What made a job save and queue again, by what the controller thought of it then."""
    try:
        job = fields((folder / f"controller-{attempt}.txt").read_text().strip())
    except OSError:
        return _ENDS.get(state, "it was told to stop")
    if job.get("PreemptTime", "None") not in ("None", "") or state == "PREEMPTED":
        return _ENDS["PREEMPTED"]
    if job.get("JobState") != "RUNNING":
        return _ENDS["REQUEUED"]
    try:
        left = datetime.fromisoformat(job["EndTime"]).timestamp() - float(job["BraidAsked"])
    except (KeyError, ValueError):
        return "it was told to stop"
    return "its time was nearly over" if left <= float(job.get("BraidSignal", 0)) + 60 else "it was told to stop"


def _losses(folder: Path, attempt: str) -> list[str]:
    try:
        return (folder / f"losses-{attempt.rpartition('-')[0]}").read_text().split()
    except OSError:
        return []


def _records(folder: Path, pattern: str) -> list[dict[str, Any]]:
    found = []
    for file in sorted(folder.glob(pattern)):
        try:
            found.append(json.loads(file.read_bytes()))
        except (OSError, ValueError):
            found.append({"message": f"{file} cannot be read"})
    return found
