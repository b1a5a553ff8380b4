"""The steps of a run as SLURM jobs, each of which begins when the one before it has ended well.

    STATE/runs/000012/job-tokenize/    the folder of a step's job, see `slurm.submission`

Enters: a plan. Leaves: queued jobs. Always holds: the folder of a step's job has one name, so no step is submitted twice;
a run is under way as long as SLURM knows one of its jobs, and the lease is given back meanwhile: what keeps other ticks
from it is the run itself.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

from pipelines.crash import crash_point
from pipelines.launch import CODE
from pipelines.recipe import read_recipe
from pipelines.recurring.lease import Lease
from pipelines.recurring.recipe import Retries, SlurmSettings
from pipelines.recurring.state import Plan, Result, State, now
from slurm.checks import SubmissionError
from slurm.commands import SlurmError
from slurm.settings import ClusterRecipe
from slurm.status import JobStatus, list_jobs, status
from slurm.submission import Task, read_job, submit

_DAYS = 30.0
"""A job whose id was not written down is looked for among those of so many days."""


class OnSlurm:
    """Queues the steps of runs."""

    name = "slurm"

    def __init__(self, settings: SlurmSettings | None) -> None:
        """Args:
        settings: None where only runs of before are asked for.
        """
        self._settings = settings

    def start(self, state: State, plan: Plan, retries: Retries, lease: Lease) -> bool:
        assert self._settings
        before: list[str] = []
        for step in plan.steps:
            try:
                lease.require()
                place = self._settings.place(step)
                cluster = read_recipe(ClusterRecipe, place.cluster, place.overrides)
                task = Task(
                    target="pipelines.recurring.step:on_cluster",
                    recipe=f"# The recipes of this job are in {state.run_folder(plan.number) / 'plan.json'}\n",
                    arguments=(str(state.folder), str(plan.number), step),
                    name=f"braid-{plan.pipeline}-{step}",
                    kind=step,
                    run=plan.pretrain["output"] if plan.pretrain and step == "pretrain" else plan.tokenize["dataset"],
                    code=CODE,
                    ray={} if step == "tokenize" else None,
                )
                crash_point("before_step")
                before = [submit(task, cluster, _folder(state, plan, step), after=before).id]
            except (SubmissionError, SlurmError) as error:
                state.add_result(plan.number, _failed(step, str(error)))
                return not before
        return False

    def under_way(self, state: State, plan: Plan) -> str:
        found = [(step, job) for step in plan.steps if (job := _job(_folder(state, plan, step)))]
        active = [(step, job) for step, job in found if job.active]
        if active:
            step, job = active[0]
            why = f" ({job.why})" if job.why else f" on {job.nodes}" if job.nodes else ""
            return f"{step} is job {job.id}, {job.state}{why}; `braid jobs show {job.id}` tells more"
        known = {result.step for result in state.results(plan.number, plan.steps)}
        for step, job in found:
            if step not in known and not job.succeeded:
                # What waited for it was cancelled.
                state.add_result(plan.number, _failed(step, f"job {job.id} ended {job.state}: {job.why}"))
                break
        return ""


def _job(folder: Path) -> JobStatus | None:
    """The job of a folder; None if none was submitted from it."""
    if read_job(folder) is None:
        return None
    file = folder / "id.json"
    if file.exists():
        return status(json.loads(file.read_bytes())["id"], folder)
    # Whoever submitted it died before it wrote the id down. SLURM keeps the folder.
    return next((job for job in reversed(list_jobs(_DAYS)) if job.folder == folder), None)


def _folder(state: State, plan: Plan, step: str) -> Path:
    return state.run_folder(plan.number) / f"job-{step}"


def _failed(step: str, why: str) -> Result:
    return Result(step=step, attempt=1, outcome="failed", why=why, begun=now(), seconds=0.0, host=socket.gethostname())
