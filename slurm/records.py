"""What SLURM has on record of jobs: the controller, which forgets after minutes, and the accounting, which lags by seconds.

Enters: options that choose jobs, those of `squeue` and `sacct` alike. Leaves: records by job id, as dictionaries of strings.
Always holds: of a job on nodes of several kinds the record is the first kind's, with the nodes of all; a cluster without
accounting has no records there, which is no error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from slurm.commands import SlurmError, run

WAITS = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
RUNS = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
ACTIVE = frozenset(WAITS | RUNS)
"""States that a job may leave by itself."""

ENDED_BADLY = frozenset(
    {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}
)
"""States of jobs that nothing that depends on them comes after."""

NOWHERE = ("", "None assigned")

_QUEUE = "%i|%T|%r|%N|%V|%S|%e|%l|%j|%Z"
_ACCOUNT = "JobID,State,Reason,NodeList,Submit,Start,End,Timelimit,JobName,ExitCode,WorkDir"

Record = Mapping[str, str]


def queue(choice: Iterable[str]) -> dict[str, Record]:
    """What the controller knows, by id: jobs that wait, run, or ended minutes ago."""
    keys = ("id", "state", "reason", "nodes", "submitted", "started", "ended", "limit", "name", "folder")
    try:
        lines = run("squeue", "-h", "-a", "-r", "-t", "all", "-o", _QUEUE, *choice).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found: dict[str, dict[str, str]] = {}
    for record in (dict(zip(keys, line.split("|", len(keys) - 1), strict=True)) for line in lines):
        # Of nodes of several kinds each has a record; the job is the one of the first.
        record["id"], _, group = record["id"].partition("+")
        if group in ("", "0"):
            found[record["id"]] = record
        elif record["id"] in found and record["nodes"] not in NOWHERE:
            found[record["id"]]["nodes"] += f",{record['nodes']}"
    return dict(found)


def accounts(choice: Iterable[str]) -> dict[str, list[Record]]:
    """What the accounting knows: for each id a record for each start."""
    keys = ("id", "state", "reason", "nodes", "submitted", "started", "ended", "limit", "name", "code", "folder")
    try:
        lines = run("sacct", "-X", "-D", "-P", "-n", f"--format={_ACCOUNT}", *choice).splitlines()
    except SlurmError as error:
        if "accounting storage is disabled" in str(error):
            return {}
        raise
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    others: dict[tuple[str, str], list[str]] = defaultdict(list)
    """Of nodes of several kinds: where the others were in each start."""
    for line in lines:
        record = dict(zip(keys, line.split("|", len(keys) - 1), strict=True))
        if "[" in record["id"]:
            # Those of an array that have not started; the queue names them one by one.
            continue
        record["state"] = record["state"].partition(" ")[0]
        record["id"], _, group = record["id"].partition("+")
        if group in ("", "0"):
            found[record["id"]].append(record)
        else:
            others[record["id"], group].append(record["nodes"])
    for (job_id, _), lists in sorted(others.items()):
        for record, nodes in zip(found.get(job_id, ()), lists, strict=False):
            if nodes not in NOWHERE and record["nodes"] not in NOWHERE:
                record["nodes"] += f",{nodes}"
    return {job_id: list[Record](records) for job_id, records in found.items()}
