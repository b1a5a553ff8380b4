"""Pretraining and tokenization on a real SLURM, disturbed: what comes out equals what an undisturbed run gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.launch import launch, tokenize_task
from pipelines.recipe import read_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.tokenize.recipe import TokenizeRecipe
from slurm.checks import SubmissionError
from slurm.status import list_jobs, status
from slurm.submission import JobHandle
from tests.pipelines.jobs import run_units
from tests.pipelines.tiny import write_corpus, write_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.training import (
    await_,
    await_end,
    cluster_recipe,
    dataset,
    faults,
    logs,
    steps_done,
    submit,
    training_recipe,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

PREEMPT = ("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("training")
    dataset(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> Path:
    job = submit(training_recipe(folder / "tokens", folder / "undisturbed"))
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    return folder / "undisturbed"


@contextmanager
def _crash(cluster: Cluster, node: str) -> Iterator[None]:
    cluster.crash(node)
    yield
    cluster.revive(node)
    cluster.await_idle()


def _train(folder: Path, name: str, until: int = 33) -> tuple[JobHandle, Path]:
    run = folder / name
    # A limit of two minutes is nearly over at once.
    job = submit(training_recipe(folder / "tokens", run), signal_before_s=110)
    await_(lambda: steps_done(run) >= until, 300, f"{until} steps: {logs(job)}")
    return job, run


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (
            PREEMPT,
            "a job of higher priority took its nodes; SIGUSR2: saved after step",
        ),
        (("scontrol", "update", "JobId={job}", "TimeLimit=2"), "its time was nearly over; SIGUSR2: saved after step"),
        (("scontrol", "requeue", "{job}"), "it was taken back (scontrol requeue)"),
    ],
    ids=["preemption", "time limit", "requeue"],
)
def test_a_disturbed_run_goes_on_and_ends_with_the_same_weights(
    cluster: Cluster, folder: Path, undisturbed: Path, command: tuple[str, ...], cause: str
) -> None:
    job, run = _train(folder, f"disturbed-{command[-1].partition('=')[0]}")
    cluster.run(*(part.format(job=job.id) for part in command))
    if "update" in command:
        await_(lambda: len(list(job.folder.glob("attempt-*"))) > 1, 300, f"a second start: {logs(job)}")
        cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert faults(run, undisturbed) == []
    found = status(job.id)
    assert found.restarts == 1
    assert cause in found.attempts[0].why


def test_a_dead_node_sends_the_run_back_to_its_last_checkpoint(
    cluster: Cluster, folder: Path, undisturbed: Path
) -> None:
    job, run = _train(folder, "crashed")
    with _crash(cluster, cluster.nodes[1]):
        assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert faults(run, undisturbed) == []
    found = status(job.id)
    assert (found.restarts, found.attempts[0].state, found.attempts[0].why) == (1, "NODE_FAIL", "a node failed")


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[TokenizeRecipe, str]:
    """A recipe for a cluster, and the hash of what it makes on this machine."""
    write_corpus(tmp_path, stamps=150, lines=600)
    file = write_recipe(tmp_path)
    local = read_recipe(TokenizeRecipe, file, [f"dataset={tmp_path / 'local'}"])
    recipe = read_recipe(TokenizeRecipe, file).model_copy(update={"workers": None})
    return recipe, dataset_hash(run_units(local))


def _await_first_units(job: JobHandle) -> None:
    log = job.folder / f"{job.id}_0_log.out"
    await_(lambda: log.exists() and " units" in log.read_text(), 300, f"its first units: {logs(job)}")


@pytest.mark.parametrize("victim", ["worker", "head"])
def test_tokenization_survives_the_crash_of_a_node(
    cluster: Cluster, corpus: tuple[TokenizeRecipe, str], victim: str
) -> None:
    recipe, expected = corpus
    job = launch([tokenize_task(recipe)], cluster_recipe(nodes=2, tasks_per_node=1, cpus_per_task=2))
    _await_first_units(job)
    nodes = cluster.run("squeue", "-h", "-j", job.id, "-o", "%N").strip()
    with _crash(cluster, cluster.nodes[1 if victim == "worker" else 0]):
        assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert nodes == f"n[{cluster.nodes[0][1:]}-{cluster.nodes[1][1:]}]"
    assert dataset_hash(Dataset.open(recipe.dataset)) == expected
    # A lost worker costs its units alone; a lost head costs a start.
    assert status(job.id).restarts == (0 if victim == "worker" else 1), status(job.id)


def test_tokenization_that_is_preempted_commits_what_is_finished_and_goes_on(
    cluster: Cluster, corpus: tuple[TokenizeRecipe, str]
) -> None:
    recipe, expected = corpus
    job = launch([tokenize_task(recipe)], cluster_recipe(nodes=2, tasks_per_node=1, cpus_per_task=2))
    _await_first_units(job)
    cluster.run(*PREEMPT)
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert dataset_hash(Dataset.open(recipe.dataset)) == expected
    found = status(job.id)
    assert found.restarts == 1
    assert "what was finished is committed" in found.attempts[0].why


def test_nodes_of_two_kinds_share_a_job_and_only_media_go_to_those_with_gpus(
    cluster: Cluster, corpus: tuple[TokenizeRecipe, str], tmp_path: Path
) -> None:
    recipe, expected = corpus
    settings = recipe.cluster.model_copy(update={"gpus_per_worker": 1})
    task = replace(
        tokenize_task(recipe.model_copy(update={"cluster": settings})),
        target="tests.slurm.targets:tokenize_on_named_gpus",
        arguments=[str(tmp_path / "witness")],
    )
    gpus = {"nodes": 1, "gpus_per_node": 2, "cpus_per_task": 1}
    with pytest.raises(
        SubmissionError, match=r"groups\.0\.gpus_per_node = 3: no node of partition main has more than 2"
    ):
        launch([task], cluster_recipe(nodes=1, tasks_per_node=1, groups=[{**gpus, "gpus_per_node": 3}]))
    kinds = cluster_recipe(nodes=1, tasks_per_node=1, cpus_per_task=1, groups=[gpus])
    job = launch([task], kinds)
    _await_first_units(job)
    # All of it is queued again, and starts on the same terms.
    cluster.run("scontrol", "requeue", job.id)
    assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert dataset_hash(Dataset.open(recipe.dataset)) == expected
    first, second = cluster.nodes[:2]
    where = [json.loads(line) for line in (tmp_path / "witness").read_text().splitlines()]
    assert {(source, node) for source, node, _ in where} == {("lines", first), ("stamps", second)}
    assert {bool(gpu) for source, _, gpu in where if source == "stamps"} == {True}
    found = status(job.id)
    assert (found.id, found.state, found.restarts) == (job.id, "COMPLETED", 1)
    assert found.nodes == f"{first},{second}"
    assert [attempt.state for attempt in found.attempts] == ["REQUEUED", "COMPLETED"]
    assert job.id in [each.id for each in list_jobs()]
    assert not [each.id for each in list_jobs() if "+" in each.id]


def test_the_end_of_a_tokenize_job_is_that_of_its_driver(
    cluster: Cluster, corpus: tuple[TokenizeRecipe, str], tmp_path: Path
) -> None:
    recipe, _ = corpus
    (tmp_path / "stamps/broken.png").write_bytes(b"no picture")
    job = launch([tokenize_task(recipe.model_copy(update={"error_budget": 0.0}))], cluster_recipe(tasks_per_node=1))
    assert await_end(cluster, job) == "FAILED", logs(job)
    found = status(job.id)
    assert found.exit_code in ("1:0", "")
    assert "error_budget" in found.why
