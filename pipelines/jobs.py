"""Jobs on a cluster together with what they have achieved: SLURM's word on a job, and the run's own figures.

Enters: the status of jobs, and the folders of their runs. Leaves: one record a job. Always holds: figures come from what the
run has written down itself, so that they are right while it runs, after a restart and when SLURM has forgotten the job.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slurm.status import JobStatus, list_jobs, status
from slurm.submission import JobHandle, SubmissionError, read_job, resubmit

RATE_STEPS = 20
"""Tokens a second are those of so many last steps."""


def show(job_id: str) -> dict[str, Any]:
    """A job and its figures.

    Raises:
        SlurmError: there is no such job.
    """
    return joined(status(job_id))


def listed(days: float) -> list[dict[str, Any]]:
    """All jobs of the last days, with their figures."""
    return [joined(job) for job in list_jobs(days)]


def joined(job: JobStatus) -> dict[str, Any]:
    """A job's status, what it is, and its run's figures."""
    record = read_job(job.folder) or {"tasks": [{}]}
    tasks = record["tasks"]
    task = tasks[int(job.id.rpartition("_")[2])] if "_" in job.id and job.id.rpartition("_")[2].isdigit() else tasks[0]
    kind, run = str(task.get("kind", "")), str(task.get("run", ""))
    return {
        **job.to_json(),
        "kind": kind,
        "run": run,
        "resumes": record.get("resumes", ""),
        "figures": figures(kind, run),
    }


def figures(kind: str, run: str) -> dict[str, Any]:
    """What a run has written down of itself; empty while there is nothing."""
    if kind == "pretrain":
        return _training(Path(run))
    if kind == "tokenize":
        return _tokens(run)
    return {}


def resume(job_id: str) -> JobHandle:
    """Submit a job that has ended once more; it goes on from what it has saved.

    Raises:
        SubmissionError: it still waits or runs, or it ended well.
    """
    job = status(job_id)
    if job.active:
        raise SubmissionError(f"job {job_id} is {job.state}: it goes on by itself; cancel it first to start it anew")
    if job.succeeded:
        raise SubmissionError(f"job {job_id} has ended well; there is nothing to go on with")
    return resubmit(job.folder, job_id=job_id)


def wait(job_id: str, timeout_s: float | None = None, poll_s: float = 2.0) -> Iterator[JobStatus]:
    """The status of a job whenever its state changes, until it has ended or the time is over."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    folder, seen = None, ""
    while True:
        job = status(job_id, folder)
        folder = job.folder
        if job.state != seen:
            seen = job.state
            yield job
        if not job.active or (deadline is not None and time.monotonic() > deadline):
            return
        time.sleep(poll_s)


def _training(run: Path) -> dict[str, Any]:
    """From the end of the metrics, so that a long run costs no more than a short one."""
    found: dict[str, Any] = {}
    train = list(_last_records(run / "metrics.jsonl"))
    if train:
        last = train[-1]
        rates = [r["tokens_per_s"] for r in train[-RATE_STEPS:]]
        found |= {"step": last["step"], "loss": last["loss"], "tokens_per_s": sum(rates) / len(rates)}
    if total := re.search(r"^steps: (\d+)$", _text(run / "recipe.yaml"), re.M):
        found["steps"] = int(total[1])
    saved = [int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")]
    if saved:
        found["last_checkpoint"] = max(saved)
    found["finished"] = (run / "finished.json").exists()
    return found


def _last_records(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with file.open("rb") as opened:
            opened.seek(0, 2)
            opened.seek(max(opened.tell() - 64 * 2**10, 0))
            lines = opened.read().splitlines(keepends=True)
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            # The first and the last one may be torn.
            continue
        if isinstance(record, dict) and record.get("kind") == "train":
            yield record


def _tokens(run: str) -> dict[str, Any]:
    from pipelines.shards.dataset import Dataset

    if not Dataset.exists(run):
        return {}
    dataset = Dataset.open(run)
    statistics = dataset.statistics()
    return {"version": dataset.version, "documents": statistics.documents, "tokens": statistics.tokens()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
