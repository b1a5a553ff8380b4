"""A job's folder, its script, and the submission.

    JOB/job.json          what was asked for: target, recipe, cluster, code; written first
    JOB/recipe.yaml       the resolved recipe, JOB/code.zip the code
    JOB/ID_TASK_log.out   what each task says, over all restarts; JOB/ID_submission.sh the script
    JOB/attempt-*.json    and other records of `entry`

Enters: a `Task` and a `ClusterRecipe`. Leaves: a queued job and its `JobHandle`. Always holds: the folder is readable by its
user alone (0700); all that a restart needs lies in it; a job is known by its folder, which SLURM keeps as its working
directory, so that no list of jobs has to be kept anywhere.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm import code
from slurm.checks import SubmissionError, check, check_dependencies, check_script
from slurm.commands import SlurmError, outside_of_any_job
from slurm.context import FOLDER_VARIABLE, write_record
from slurm.entry import Entry
from slurm.groups import with_groups
from slurm.script import after_the_tasks, before_the_tasks
from slurm.settings import ClusterRecipe

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a job runs."""

    target: str
    """`package.module:callable`, called as `callable(recipe, arguments)` in every task."""
    recipe: str
    """A recipe as text (it becomes a file in the job's folder), or the path of one."""
    arguments: Sequence[str] = ()
    name: str = "braid"
    """Of the job, in the queue."""
    kind: str = "job"
    """What whoever lists jobs tells them apart by: pretrain, tokenize, ..."""
    run: str = ""
    """Where its results go: a run's folder, a dataset."""
    code: Sequence[str] = ("slurm",)
    """Packages, and folders beside them, that the archive holds."""
    ray: dict[str, Any] | None = None
    """Settings of a Ray cluster inside the job, see `ray_cluster`; the callable then runs once, on its first node."""


@dataclass(frozen=True, kw_only=True)
class JobHandle:
    """A submitted job."""

    id: str
    folder: Path
    tasks: tuple[str, ...] = field(default=())
    """Of an array: the ids of its jobs."""


def submit(
    task: Task, cluster: ClusterRecipe, folder: Path, *, after: Iterable[str] = (), resumes: str = ""
) -> JobHandle:
    """Queue a job.

    Args:
        folder: of the job: a new one, on a file system that the nodes share.
        after: ids of jobs that must have ended well before; if one fails, this one is cancelled.
        resumes: the id of the job that this one goes on with.

    Raises:
        SubmissionError: the cluster would refuse it, or it could not start there; nothing is left behind.
        SlurmError: there is no SLURM here, or it does not answer.
    """
    return submit_many([task], cluster, folder, after=after, resumes=resumes)


def submit_many(
    tasks: Sequence[Task],
    cluster: ClusterRecipe,
    folder: Path,
    *,
    after: Iterable[str] = (),
    resumes: str = "",
    at_once: int | None = None,
    archive: Path | None = None,
) -> JobHandle:
    """Queue an array of jobs that differ in their recipes and arguments alone; one is a plain job. See `submit`.

    Args:
        at_once: how many of them may run at a time; None is all.
        archive: the code of an earlier job; None takes that of this moment.
    """
    folder = folder.absolute()
    after = tuple(after)
    check_dependencies(after)
    check(cluster, next(p for p in folder.parents if p.exists()))
    made = _make_folder(folder)
    try:
        if archive is not None:
            shutil.copyfile(archive, folder / "code.zip")
        entries = [_prepare(task, folder, f"-{n}" if len(tasks) > 1 else "") for n, task in enumerate(tasks)]
        _record(tasks, cluster, folder, resumes)
        executor = _executor(tasks[0], cluster, folder, after, at_once)
        script = folder / "script.sh"
        script.write_text(_text(executor, len(tasks)))
        check_script(script)
        script.unlink()
        with outside_of_any_job(), _quietly():
            jobs = [executor.submit(entries[0])] if len(entries) == 1 else executor.submit_array(entries)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    ids = tuple(str(job.job_id) for job in jobs)
    job_id = ids[0].partition("_")[0]
    write_record(folder / "id.json", {"id": job_id, "tasks": len(ids)})
    return JobHandle(id=job_id, folder=folder, tasks=ids if len(ids) > 1 else ())


def resubmit(folder: Path, *, job_id: str, cluster: ClusterRecipe | None = None) -> JobHandle:
    """Queue a job once more: the same recipe, code and directory, in a new folder beside its own.

    Args:
        folder, job_id: of the job that has ended.
        cluster: other settings; None takes the same.

    Raises:
        SubmissionError: the folder holds no job, or the cluster would refuse it.
    """
    record = read_job(folder)
    if record is None:
        raise SubmissionError(f"{folder}: no folder of a job, so nothing can be submitted again from it")
    tasks = [
        Task(**{**task, "recipe": str(path)}) for task, path in zip(record["tasks"], _recipes(folder), strict=True)
    ]
    settings = cluster or ClusterRecipe.model_validate_json(json.dumps(record["cluster"]))
    with contextlib.chdir(record["directory"]):
        return submit_many(
            tasks, settings, new_folder(folder.parent, tasks[0].name), resumes=job_id, archive=folder / "code.zip"
        )


def _recipes(folder: Path) -> list[Path]:
    one = folder / "recipe.yaml"
    return [one] if one.exists() else sorted(folder.glob("recipe-*.yaml"), key=lambda p: int(p.stem.rpartition("-")[2]))


def script(task: Task, cluster: ClusterRecipe, folder: Path, *, tasks: int = 1, after: Iterable[str] = ()) -> str:
    """The exact script that `submit` would hand to sbatch; nothing is written."""
    return _text(_executor(task, cluster, folder.absolute(), after, None), tasks)


def new_folder(parent: Path, name: str) -> Path:
    """A path for a new job below a folder, named by the time."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
    folder, number = parent / stem, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stem}-{number}"
    return folder


def read_job(folder: Path) -> dict[str, Any] | None:
    """What was asked for in a job's folder; None if it is none that can be read."""
    try:
        record = json.loads((folder / "job.json").read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def _make_folder(folder: Path) -> Path:
    """Make a new folder for the user alone; returns the highest one that had to be made."""
    made = folder
    while not made.parent.exists():
        made = made.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise SubmissionError(f"{folder}: {error.strerror}; name another folder for the job") from error
    return made


def _prepare(task: Task, folder: Path, suffix: str) -> Entry:
    recipe = folder / f"recipe{suffix}.yaml"
    if "\n" in task.recipe:
        recipe.write_text(task.recipe, encoding="utf-8")
    else:
        shutil.copyfile(task.recipe, recipe)
    packed = folder / "code.zip"
    if not packed.exists():
        code.archive({*task.code, "slurm", task.target.partition(".")[0].partition(":")[0]}, packed)
    return Entry(
        target=task.target,
        recipe=str(recipe),
        arguments=tuple(task.arguments),
        archive=str(packed),
        directory=str(Path.cwd()),
        ray=task.ray,
    )


def _record(tasks: Sequence[Task], cluster: ClusterRecipe, folder: Path, resumes: str) -> None:
    record = {
        "format": FORMAT,
        "submitted": time.time(),
        "directory": str(Path.cwd()),
        "cluster": cluster.model_dump(mode="json"),
        "resumes": resumes,
        "tasks": [{**asdict(task), "recipe": ""} for task in tasks],
    }
    write_record(folder / "job.json", record)


def _executor(task: Task, cluster: ClusterRecipe, folder: Path, after: Iterable[str], at_once: int | None) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise SlurmError("submitting needs the package submitit: pip install submitit") from error
    with _quietly():
        # Without SLURM on this machine a script can be shown all the same.
        executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
        submitit.core.core.PicklingExecutor.__init__(executor, folder)
    executor.python = cluster.python
    more: dict[str, Any] = {**cluster.options, "chdir": str(folder), "requeue": True}
    if dependencies := ":".join(after):
        more |= {"dependency": f"afterok:{dependencies}", "kill-on-invalid-dep": "yes"}
    arguments = ["--kill-on-bad-exit=1", *cluster.srun]
    tasks_per_node = cluster.tasks
    if task.ray is not None:
        # One task a node; a node that is lost takes neither the job nor the other nodes with it.
        more["no-kill"] = True
        arguments = ["--kill-on-bad-exit=0", "--no-kill", "--wait=3", *cluster.srun]
        tasks_per_node = 1
    elif cluster.groups:
        raise SubmissionError("groups: nodes of several kinds are for tokenization; leave them out")
    cpus_per_task = cluster.cpus // tasks_per_node
    # srun no longer takes it from sbatch (since 22.05), and would give each task one CPU.
    arguments.insert(0, f"--cpus-per-task={cpus_per_task}")
    parameters = {
        "job_name": task.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.whole_minutes,
        "nodes": cluster.nodes,
        "ntasks_per_node": tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cpus_per_task,
        "mem": cluster.memory,
        "signal_delay_s": cluster.signal_before_s,
        "stderr_to_stdout": True,
        "setup": before_the_tasks(cluster, folder, FOLDER_VARIABLE),
        "teardown": after_the_tasks(cluster, folder),
        "additional_parameters": more,
        "srun_args": arguments,
        "wckey": None,
    }
    executor.parameters = {key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    if at_once:
        executor.parameters["array_parallelism"] = at_once
    if cluster.groups:
        plain = executor._make_submission_file_text
        executor._make_submission_file_text = lambda *arguments: with_groups(plain(*arguments), cluster, folder)
    return executor


def _text(executor: Any, tasks: int) -> str:
    extra = {"map_count": tasks} if tasks > 1 else {}
    executor.parameters |= extra
    text = str(executor._make_submission_file_text(executor._submitit_command_str, ""))
    for key in extra:
        del executor.parameters[key]
    return text


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
