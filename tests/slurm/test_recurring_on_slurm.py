"""A recurring pipeline whose steps are SLURM jobs, chained by dependencies, on the real test cluster."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.pretrain.stages import read_stages
from pipelines.recurring.doctor import examine
from pipelines.recurring.entries import install, remove
from pipelines.recurring.recipe import tokenize_recipe
from pipelines.recurring.tick import Ticked, tick
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import Nightly
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def nightly(tmp_path: Path, cluster: Cluster) -> Nightly:
    common = {"partition": "main", "time": "10", "assume_shared": True, "cpus_per_task": 2, "signal_before_s": 60}
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(common))
    place: dict[str, Any] = {"cluster": str(tmp_path / "node.yaml")}
    two = place | {"overrides": ["nodes=2", "tasks_per_node=1", "cpus_per_task=1"]}
    made = Nightly(tmp_path, slurm={"tokenize": place, "pretrain": two, "others": place})
    recipe = yaml.safe_load(made.file.read_text())
    recipe["pretrain"]["overrides"] = ["batch.sequences=4"]
    made.file.write_text(yaml.safe_dump(recipe))
    return made


def _queue(nightly: Nightly) -> list[str]:
    """Names and dependencies of a pipeline's jobs."""
    command = ["squeue", "-h", "-t", "pending,running", "-o", "%Z %j %E"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.startswith(str(nightly.folder))]


def _until_over(nightly: Nightly, timeout_s: float = 300.0) -> Ticked:
    """Tick as a scheduler does, until a run was recorded."""
    deadline = time.monotonic() + timeout_s
    number, said = nightly.state.numbers()[-1], Ticked(said="")
    while nightly.state.record(number) is None:
        assert time.monotonic() < deadline, said
        time.sleep(1.0)
        said = tick("nightly", nightly.recipe)
    return said


def test_steps_are_queued_once_and_follow_one_another(nightly: Nightly) -> None:
    said = tick("nightly", nightly.recipe).said
    assert "run 1: tokenize is job" in said
    queue = _queue(nightly)
    assert len(queue) == 5
    assert sum("afterok:" in line for line in queue) == 4
    assert "run 1 is under way: tokenize is job" in tick("nightly", nightly.recipe).said
    ticked = _until_over(nightly)
    record = nightly.state.record(1)
    assert record
    assert (record.outcome, record.documents, record.executor) == ("done", 10, "slurm"), record
    assert [(r.step, r.outcome) for r in record.steps] == [
        (step, "done") for step in ("tokenize", "pretrain", "evaluate", "export", "clean")
    ]
    assert "nothing to do" in ticked.said
    assert (nightly.folder / "models/latest/model.safetensors").exists()
    assert len(read_stages(nightly.folder / "run")) == 1


def test_a_step_that_fails_cancels_what_waits_for_it_and_the_next_tick_says_why(nightly: Nightly) -> None:
    model = nightly.folder / "text.model"
    model.rename(nightly.folder / "away")
    tick("nightly", nightly.recipe)
    _until_over(nightly)
    record = nightly.state.record(1)
    assert record
    assert record.outcome == "failed"
    assert "tokenize: no text tokenizer" in record.why
    # The tick that recorded it has tried again, and the tokenizer is still away.
    (nightly.folder / "away").rename(model)
    _until_over(nightly)


def test_a_cluster_recipe_that_slurm_refuses_is_a_failure_that_is_recorded(nightly: Nightly) -> None:
    (nightly.folder / "node.yaml").write_text("partition: nowhere\ntime: 10\n")
    ticked = tick("nightly", nightly.recipe)
    assert ticked.record
    assert ticked.record.outcome == "failed"
    assert "partition = nowhere" in ticked.record.why
    assert _queue(nightly) == []


@pytest.mark.skipif(not shutil.which("scrontab"), reason="no scrontab here: bash tests/slurm/build_scrontab.sh")
def test_scrontab_fires_and_a_cancelled_entry_is_found_and_mended(tmp_path: Path, cluster: Cluster) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    run_units(tokenize_recipe(nightly.recipe))
    subprocess.run(["scrontab", "-r"], check=False, capture_output=True)
    other = tmp_path / "other"
    other.write_text("0 5 * * * /bin/true\n")
    subprocess.run(["scrontab", str(other)], check=True, capture_output=True)
    options = ["--partition=main", "--time=5"]
    install("nightly", nightly.file, [], nightly.state, "scrontab", "* * * * *", options)
    try:
        deadline = time.monotonic() + 200
        while nightly.state.last_tick is None:
            assert time.monotonic() < deadline, _scrontab()
            time.sleep(1.0)
        assert "nothing to do" in nightly.state.last_tick["said"]
        assert _faults(nightly) == []
        jobs = subprocess.run(
            ["squeue", "-h", "-n", "braid-nightly", "-o", "%i"], capture_output=True, text=True, check=True
        )
        subprocess.run(["scancel", *jobs.stdout.split()], check=True)
        assert (
            "its entry in scrontab is disabled (a cancelled job of scrontab is written back so)" in _faults(nightly)[0]
        )
        install("nightly", nightly.file, [], nightly.state, "scrontab", "hourly", options)
        assert _faults(nightly) == []
        assert _scrontab().count("# braid pipeline nightly") == 1
        assert _scrontab().count("#SCRON") == 1
    finally:
        assert remove("nightly", nightly.state) == ["scrontab"]
    assert "0 5 * * * /bin/true" in _scrontab()
    assert "braid" not in _scrontab()


def _scrontab() -> str:
    return subprocess.run(["scrontab", "-l"], capture_output=True, text=True, check=True).stdout


def _faults(nightly: Nightly) -> list[str]:
    return [finding.text for finding in examine("nightly", nightly.recipe) if finding.level == "fault"]
