"""Jobs on a real SLURM: submitted, refused before they are, followed, resumed, and explained when they fail."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import jobs
from slurm.checks import SubmissionError
from slurm.commands import SlurmError
from slurm.settings import ClusterRecipe
from slurm.status import status
from slurm.submission import JobHandle, Task, new_folder, submit, submit_many
from tests.slurm.cluster import Cluster
from tests.slurm.training import await_, await_end, cluster_recipe, dataset, job_state, logs, training_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def _task(name: str, *arguments: str) -> Task:
    return Task(target=f"tests.slurm.targets:{name}", recipe="a: 1\n", arguments=arguments, name=name)


def _submit(folder: Path, name: str, *arguments: str, **changes: Any) -> JobHandle:
    settings = {"nodes": 1, "tasks_per_node": 2, **changes}
    return submit(_task(name, *arguments), cluster_recipe(**settings), new_folder(folder / "jobs", name))


def _braid(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=400)


def test_every_task_runs_the_archived_code_with_recipe_and_arguments(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "hello", "x=1", "y z", nodes=2, gpus_per_node=2)
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert job.folder.stat().st_mode & 0o777 == 0o700
    for rank in range(4):
        said = (job.folder / f"{job.id}_{rank}_log.out").read_text()
        assert "recipe 'a: 1' arguments ['x=1', 'y z']" in said
        assert f"rank {rank} of 4" in said
        assert "gpus 0,1" in said
        # Unpacked under the archive's own name, not the checkout.
        assert f"code {ROOT.name}\n" not in said
    with zipfile.ZipFile(job.folder / "code.zip") as packed:
        assert {"slurm/entry.py", "tests/slurm/targets.py"} <= set(packed.namelist())
    found = status(job.id)
    assert (found.state, found.succeeded, found.restarts, found.folder) == ("COMPLETED", True, 0, job.folder)
    assert found.attempts[0].nodes == cluster.run("squeue", "-h", "-t", "all", "-j", job.id, "-o", "%N").strip()


def test_every_fault_is_found_before_submission_and_nothing_is_left(cluster: Cluster, tmp_path: Path) -> None:
    wrong = cluster_recipe(account="phisics", qos="fast", time="2-00:00:00", nodes=9, gpus_per_node=3, memory_gb=64.0)
    with pytest.raises(SubmissionError) as caught:
        submit(_task("hello"), wrong, tmp_path / "jobs/a")
    said = str(caught.value)
    for words in (
        "6 faults",
        "account = phisics: unknown; did you mean physics?",
        "qos = fast: unknown",
        "time = 2-00:00:00: partition main allows at most 1-00:00:00",
        "nodes = 9: partition main gives at most 4",
        "gpus_per_node = 3: no node of partition main has more than 2 GPUs",
        "memory_gb = 64.0: no node of partition main has more than 5000 MB",
    ):
        assert words in said
    with pytest.raises(SubmissionError, match=r"partition = mian: unknown; did you mean main\?"):
        submit(_task("hello"), cluster_recipe(partition="mian"), tmp_path / "jobs/a")
    with pytest.raises(SubmissionError, match=r"venv = /nowhere: there is no /nowhere/bin/python"):
        submit(_task("hello"), cluster_recipe(venv="/nowhere"), tmp_path / "jobs/a")
    with pytest.raises(SubmissionError, match="the cluster would refuse this job"):
        submit(_task("hello"), cluster_recipe(sbatch={"reservation": "nobody"}), tmp_path / "jobs/a")
    with pytest.raises(SubmissionError, match=r"/dev/shm, a tmpfs of this machine alone"):
        submit(_task("hello"), cluster_recipe(), Path("/dev/shm/braid-test/jobs/a"))
    assert not (tmp_path / "jobs").exists()
    assert not Path("/dev/shm/braid-test").exists()


def test_without_sbatch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not on the path: submit from a login node"):
        submit(_task("hello"), ClusterRecipe(), tmp_path / "jobs/a")


def test_one_failed_task_ends_all_and_its_message_is_shown(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "fail")
    assert await_end(cluster, job) == "FAILED"
    why = status(job.id).why
    assert why.startswith("ValueError: the sky is falling (task 1 on n")
    assert status(job.id).restarts == 0


def test_a_job_that_loses_tasks_without_a_word_is_queued_again_a_bounded_number_of_times(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = _submit(tmp_path, "vanish", "1")
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert status(job.id).restarts == 1
    hopeless = _submit(tmp_path, "vanish", "9", lost_rank_restarts=1)
    assert await_end(cluster, hopeless) == "FAILED", logs(hopeless)
    found = status(hopeless.id)
    assert found.restarts == 1
    assert "tasks were lost, and none says why" in found.why


def test_a_python_that_the_node_lacks_is_explained(cluster: Cluster, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    job = _submit(tmp_path, "hello", venv=str(venv), setup=[f"rm {venv}/bin/python"])
    assert await_end(cluster, job) == "FAILED"
    assert f"has no {venv}/bin/python; set venv in the cluster recipe" in status(job.id).why


def test_a_folder_that_the_nodes_do_not_see_is_explained(cluster: Cluster, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    cluster.hide(cluster.nodes[0], hidden)
    try:
        job = _submit(hidden, "hello", sbatch={"nodelist": cluster.nodes[0]}, tasks_per_node=1)
        assert await_end(cluster, job) == "FAILED"
        assert "the nodes do not see this folder; name one on a file system that all" in status(job.id).why
    finally:
        cluster.reveal(cluster.nodes[0], hidden)


def test_a_full_disk_is_explained(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "full_disk", tasks_per_node=1)
    assert await_end(cluster, job) == "FAILED"
    assert "the disk is full: " in status(job.id).why
    assert "/data/checkpoint" in status(job.id).why


def test_jobs_come_after_others_and_never_after_a_failed_one(cluster: Cluster, tmp_path: Path) -> None:
    first = _submit(tmp_path, "sleep", "3", tasks_per_node=1)
    settings = cluster_recipe(nodes=1, tasks_per_node=1)
    second = submit(_task("hello"), settings, tmp_path / "jobs/second", after=[first.id])
    assert "Dependency" in status(second.id).why
    # Not before the next one is there: SLURM takes no job after one that has failed.
    failing = submit(_task("exit_with", "3", "15"), settings, tmp_path / "jobs/failing")
    third = submit(_task("hello"), settings, tmp_path / "jobs/third", after=[failing.id])
    assert await_end(cluster, second) == "COMPLETED"
    assert await_end(cluster, third) == "CANCELLED"
    assert status(third.id).why == "a job that it was to come after has failed"
    with pytest.raises(
        SubmissionError, match=rf"after = {failing.id}: it has ended as FAILED, so .* resume {failing.id}`"
    ):
        submit(_task("hello"), settings, tmp_path / "jobs/fourth", after=[second.id, failing.id])
    with pytest.raises(SubmissionError, match="after = 999999: neither the queue nor the accounting knows it"):
        submit(_task("hello"), settings, tmp_path / "jobs/fourth", after=["999999"])


def test_an_array_runs_each_of_its_recipes(cluster: Cluster, tmp_path: Path) -> None:
    tasks = [_task("hello", f"n={n}") for n in range(3)]
    job = submit_many(tasks, cluster_recipe(nodes=1, tasks_per_node=1), tmp_path / "jobs/array", at_once=2)
    assert len(job.tasks) == 3
    with pytest.raises(SlurmError, match=f"job {job.id} is an array: name one of {job.id}_0"):
        status(job.id)
    for number, each in enumerate(job.tasks):
        assert [s.state for s in jobs.wait(each, 240)][-1] == "COMPLETED", logs(job)
        assert f"arguments ['n={number}']" in (job.folder / f"{each}_0_log.out").read_text()


def test_a_cancelled_job_stays_so_and_can_be_resumed_with_the_same_code(cluster: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "sleep", "8", tasks_per_node=1)
    await_(lambda: (job.folder / f"attempt-{job.id}-0.json").exists(), 120, "it runs")
    with pytest.raises(SubmissionError, match="goes on by itself"):
        jobs.resume(job.id)
    assert _braid("jobs", "cancel", job.id).returncode == 0
    assert await_end(cluster, job) == "CANCELLED"
    again = jobs.resume(job.id)
    assert (again.folder / "code.zip").read_bytes() == (job.folder / "code.zip").read_bytes()
    assert await_end(cluster, again) == "COMPLETED", logs(again)
    assert jobs.show(again.id)["resumes"] == job.id
    assert job_state(cluster, job) == "CANCELLED"


def test_the_command_submits_lists_shows_follows_and_waits(cluster: Cluster, tmp_path: Path) -> None:
    recipe = training_recipe(dataset(tmp_path), tmp_path / "run", steps=12)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    settings = ["slurm.nodes=2", "slurm.tasks_per_node=2", "slurm.time=10", "slurm.cpus_per_task=1"]
    dry = _braid("pretrain", str(file), "--on", "slurm", "--dry-run", *settings)
    assert dry.returncode == 0, dry.stderr
    for words in (
        "#SBATCH --nodes=2",
        "srun --unbuffered",
        "kill-on-bad-exit=1",
        "GPU-hours",
        "GB on disk",
        "steps: 12",
    ):
        assert words in dry.stdout
    assert not (tmp_path / "run").exists()
    done = _braid("pretrain", str(file), "--on", "slurm", *settings)
    assert done.returncode == 0, done.stderr
    job_id = done.stdout.split()[1]
    waited = _braid("jobs", "wait", job_id)
    assert (waited.returncode, "COMPLETED" in waited.stdout) == (0, True), waited.stdout + waited.stderr
    shown = json.loads(_braid("jobs", "show", job_id, "--json").stdout)
    assert (shown["state"], shown["kind"], shown["restarts"]) == ("COMPLETED", "pretrain", 0)
    assert shown["figures"]["step"] == shown["figures"]["steps"] == 12
    assert shown["figures"]["finished"]
    assert shown["figures"]["tokens_per_s"] > 0
    assert set(shown["figures"]["loss"]) == {"text", "image", "audio"}
    listed = json.loads(_braid("jobs", "list", "--json").stdout)
    assert job_id in [job["id"] for job in listed]
    followed = _braid("jobs", "logs", "-f", job_id)
    assert "0: 12 steps of 768 tokens" in followed.stdout
    assert any(line.startswith("3: ") for line in io.StringIO(followed.stdout))
    assert "3: " not in _braid("jobs", "logs", "--rank", "0", job_id).stdout
    assert _braid("jobs", "show", "999999").returncode == 1
