"""Where jobs are: from the controller, from the accounting, and from the jobs' own folders.

Enters: the id of a job, or nothing. Leaves: `JobStatus`, with every start of the job. Always holds: what the controller knows
counts more than the accounting, which lags behind by seconds; a job that was queued again after a node failure is alive,
though its last finished record says NODE_FAIL; what neither knows is said to be unknown, not to be done.
"""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm import causes
from slurm.commands import SlurmError
from slurm.records import ACTIVE, NOWHERE, RUNS, WAITS, Record, accounts, queue
from slurm.submission import read_job

LAG_S = 60.0
"""For so long after its submission a job that nobody knows is taken for one that nobody knows yet."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job."""

    number: int
    """0 is the first; the others followed when it was queued again."""
    state: str
    nodes: str
    started: float | None
    ended: float | None
    why: str
    """Why it ended, in words; "" while it runs or if it ended well."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job as it is now."""

    id: str
    name: str
    state: str
    """SLURM's word, or UNKNOWN."""
    source: str
    """Who says so: controller, accounting or folder."""
    why: str
    """Why it waits, or why it ended, with the remedy where there is one; "" if there is nothing to say."""
    nodes: str
    submitted: float | None
    started: float | None
    ended: float | None
    time_limit: str
    exit_code: str
    folder: Path
    attempts: tuple[Attempt, ...] = ()

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.state == "COMPLETED"

    @property
    def restarts(self) -> int:
        """How often it was queued again and started."""
        return max(len(self.attempts) - 1, 0)

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "active": self.active,
            "succeeded": self.succeeded,
            "restarts": self.restarts,
        }


def status(job_id: str, folder: Path | None = None) -> JobStatus:
    """A job of Braid.

    Args:
        folder: where it is known; then a job of the same id in another folder, of a cluster whose counter began anew, is
            another job.

    Raises:
        SlurmError: there is no such job, or SLURM does not answer.
    """
    found = _statuses(queue(("-j", job_id)), accounts(("-j", job_id)))
    of_array = [s.id for s in found if s.id.startswith(f"{job_id}_")]
    found = [s for s in found if s.id == job_id and (folder is None or s.folder == folder)]
    if found:
        return found[-1]
    if of_array:
        raise SlurmError(f"job {job_id} is an array: name one of {', '.join(of_array)}")
    if folder is not None and (record := read_job(folder)):
        return _forgotten(job_id, folder, record)
    raise SlurmError(
        f"job {job_id}: neither the queue nor the accounting has a job of Braid's with this id; see braid jobs list"
    )


def list_jobs(days: float = 7.0, user: str | None = None) -> list[JobStatus]:
    """Jobs of Braid that a user submitted or that ran in the last days, oldest first."""
    who = user or getpass.getuser()
    since = datetime.fromtimestamp(time.time() - days * 86400).strftime("%Y-%m-%dT%H:%M:%S")
    return sorted(_statuses(queue(("-u", who)), accounts(("-u", who, "-S", since))), key=lambda s: s.submitted or 0.0)


def _statuses(known: Mapping[str, Record], accounted: Mapping[str, list[Record]]) -> list[JobStatus]:
    made = []
    for job_id in dict.fromkeys([*accounted, *known]):
        past, live = list(accounted.get(job_id, ())), known.get(job_id)
        newest = live or past[-1]
        folder = Path(newest["folder"])
        if read_job(folder) is None:
            continue
        # A counter that began anew gives one id to several jobs.
        past = [record for record in past if record["folder"] == newest["folder"]]
        made.append(_status(job_id, folder, live, past))
    return made


def _status(job_id: str, folder: Path, live: Record | None, past: list[Record]) -> JobStatus:
    newest = live or past[-1]
    state = newest["state"]
    if live is None and state in ACTIVE:
        # The controller keeps what is alive; so this is a record that nobody closed.
        state = "UNKNOWN"
    attempts = _attempts(job_id, folder, live, past)
    made = JobStatus(
        id=job_id,
        name=newest["name"],
        state=state,
        source="controller" if live else "accounting",
        why="",
        nodes="" if newest["nodes"] in NOWHERE else newest["nodes"],
        submitted=_time(past[0]["submitted"] if past else newest["submitted"]),
        started=_time(newest["started"]) if state != "PENDING" else None,
        ended=_time(newest["ended"]) if state not in ACTIVE else None,
        time_limit=newest["limit"],
        exit_code=past[-1]["code"] if past and past[-1]["state"] == state else "",
        folder=folder,
        attempts=attempts,
    )
    if state in WAITS:
        return replace(made, why=causes.of_waiting(newest["reason"]))
    if made.active or made.succeeded:
        return made
    ended = attempts[-1].why if attempts else causes.without_a_start(folder, state, newest["reason"])
    return replace(made, why=ended)


def _attempts(job_id: str, folder: Path, live: Record | None, past: list[Record]) -> tuple[Attempt, ...]:
    """Every start, from the accounting and from what the tasks and the script have left."""
    numbers = [
        int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(rf"attempt-{re.escape(job_id)}-(\d+)\.json", p.name))
    ]
    started = _starts(past)
    if live and live["state"] not in WAITS and live["nodes"] not in NOWHERE:
        since = _time(live["started"])
        if not started or since is None or since > (_time(started[-1]["started"]) or 0.0) + 1:
            # The accounting has not heard of this start.
            started.append(live)
    made = []
    for number in range(max(len(started), max(numbers, default=-1) + 1)):
        record = started[number] if number < len(started) else {}
        state = record.get("state", "UNKNOWN")
        if live and number == len(started) - 1:
            # Nor has it of its end, perhaps.
            state = live["state"] if live["state"] not in WAITS else "REQUEUED" if state in RUNS else state
        elif state in RUNS:
            state = "REQUEUED"
        left = _read(folder / f"attempt-{job_id}-{number}.json")
        made.append(
            Attempt(
                number=number,
                state=state,
                nodes=record.get("nodes") or str(left.get("nodes", "")),
                started=_time(record.get("started", "")) or left.get("started"),
                ended=None if state in RUNS else _time(record.get("ended", "")),
                why=""
                if state in RUNS or state == "COMPLETED"
                else causes.of_an_end(folder, f"{job_id}-{number}", state),
            )
        )
    return tuple(made)


def _starts(past: Iterable[Record]) -> list[Record]:
    """The records of starts; what follows on a RESIZING one is the same start, with the nodes that it has left."""
    found: list[Record] = []
    resized: Record | None = None
    for record in past:
        if _time(record["started"]) is None or record["nodes"] in NOWHERE:
            # It waited, or was cancelled while it did.
            continue
        if resized:
            record = {**record, "started": resized["started"], "nodes": resized["nodes"]}
        resized = record if record["state"] == "RESIZING" else None
        if not resized:
            found.append(record)
    return found


def _forgotten(job_id: str, folder: Path, record: Mapping[str, Any]) -> JobStatus:
    age = time.time() - float(record["submitted"])
    young = age < LAG_S
    return JobStatus(
        id=job_id,
        name=str(record["tasks"][0]["name"]),
        state="PENDING" if young else "UNKNOWN",
        source="folder",
        why="submitted just now"
        if young
        else "neither the queue nor the accounting knows it (any more); braid jobs resume "
        "submits it again, and it goes on from what it has saved",
        nodes="",
        submitted=float(record["submitted"]),
        started=None,
        ended=None,
        time_limit=str(record["cluster"]["time"]),
        exit_code="",
        folder=folder,
    )


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        # Unknown, N/A, None.
        return None


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
