"""Pretraining and tokenization on a real SLURM, disturbed: what comes out equals what an undisturbed run gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.launch import launch, tokenize_task
from pipelines.recipe import read_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.tokenize.recipe import TokenizeRecipe
from slurm.status import status
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
            ("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5"),
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


@pytest.mark.parametrize("victim", ["worker", "head"])
def test_tokenization_survives_the_crash_of_a_node(cluster: Cluster, tmp_path: Path, victim: str) -> None:
    write_corpus(tmp_path, stamps=150, lines=600)
    file = write_recipe(tmp_path)
    local = read_recipe(TokenizeRecipe, file, [f"dataset={tmp_path / 'local'}"])
    expected = dataset_hash(run_units(local))
    recipe = read_recipe(TokenizeRecipe, file).model_copy(update={"workers": None})
    job = launch([tokenize_task(recipe)], cluster_recipe(nodes=2, tasks_per_node=1, cpus_per_task=2))
    log = job.folder / f"{job.id}_0_log.out"
    await_(lambda: log.exists() and " units" in log.read_text(), 300, f"its first units: {logs(job)}")
    nodes = cluster.run("squeue", "-h", "-j", job.id, "-o", "%N").strip()
    with _crash(cluster, cluster.nodes[1 if victim == "worker" else 0]):
        assert await_end(cluster, job) == "COMPLETED", logs(job)
    assert nodes == f"n[{cluster.nodes[0][1:]}-{cluster.nodes[1][1:]}]"
    assert dataset_hash(Dataset.open(recipe.dataset)) == expected
    # A lost worker costs its units alone; a lost head costs a start.
    assert status(job.id).restarts == (0 if victim == "worker" else 1), status(job.id)
