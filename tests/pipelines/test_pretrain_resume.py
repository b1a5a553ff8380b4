"""A run that was stopped goes on, bit for bit in one process, and with any number of ranks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.export import load_model
from pipelines.pretrain.run import RunError, RunResult
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import make_dataset, write_unit
from tests.pipelines.training import (
    LEAN,
    TWO_RANKS,
    assert_close,
    counting_row,
    losses_of,
    run_recipe,
    started,
    torch_weights,
    trained,
    unfinished,
)


@pytest.mark.parametrize("place", ["while_saving", "before_rename"])
def test_a_killed_run_goes_on_bit_for_bit(
    dataset: Dataset, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    recipe = run_recipe(dataset, tmp_path / "run", logging={"every": 1, "tensorboard": False})
    (tmp_path / "once").touch()
    monkeypatch.setenv("BRAID_CRASH", f"{place}:2:{tmp_path}/once")
    process = started(recipe, tmp_path)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told.decode()
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not (tmp_path / "run" / "finished.json").exists()
    with metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    went_on = trained(recipe)
    assert went_on.resumed_from == 4
    assert losses_of(went_on.folder) == losses_of(finished.folder)
    assert went_on.validation == finished.validation
    ours, theirs = (torch_weights(folder) for folder in (went_on.folder, finished.folder))
    assert ours == theirs


def test_a_second_process_in_the_same_folder_is_refused_and_disturbs_nothing(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = unfinished(finished, tmp_path)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=rf"{folder}: another process is training here; wait for it, or set"):
            trained(run_recipe(dataset, folder))
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.communicate()
    assert trained(run_recipe(dataset, folder)).resumed_from == 12


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes_and_one_goes_on_from_two(dataset: Dataset, tmp_path: Path) -> None:
    # Dropout draws by rank, so it is off here.
    model = run_recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0}
    alone = trained(run_recipe(dataset, tmp_path / "alone", model=model, batch={"sequences": 8, "micro_batch": 2}))
    recipe = run_recipe(dataset, tmp_path / "two", model=model, batch={"sequences": 8, "micro_batch": 2})
    process = started(recipe, tmp_path, *TWO_RANKS)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert_close(losses_of(tmp_path / "two"), losses_of(alone.folder))
    # Forget the last four steps, and take them again with one rank.
    (tmp_path / "two" / "finished.json").unlink()
    last = list_checkpoints(tmp_path / "two" / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    assert trained(recipe).resumed_from == 8
    assert_close(losses_of(tmp_path / "two"), losses_of(alone.folder))


@pytest.mark.slow
def test_four_ranks_with_masters_in_the_optimizer_follow_one_and_two_go_on(dataset: Dataset, tmp_path: Path) -> None:
    model = run_recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0, "block_backend": "fused"}
    more = LEAN | {"model": model, "batch": {"sequences": 8, "micro_batch": 1}}
    alone = losses_of(trained(run_recipe(dataset, tmp_path / "alone", **more)).folder)
    recipe = run_recipe(dataset, tmp_path / "four", **more)
    for ranks in (4, 2):
        process = started(recipe, tmp_path, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
        four = losses_of(tmp_path / "four")
        assert [step for step, _, _ in four] == [step for step, _, _ in alone]
        for (_, ours, _), (_, theirs, _) in zip(four, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-3)
        # Forget the last four steps, and take them again with two ranks.
        (tmp_path / "four" / "finished.json").unlink()
        shutil.rmtree(list_checkpoints(tmp_path / "four" / "checkpoints")[-1])


def test_a_run_keeps_to_the_version_it_began_with(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=30)
    recipe = run_recipe(dataset, tmp_path / "run")
    trained(recipe)
    (tmp_path / "run" / "finished.json").unlink()
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    before = losses_of(tmp_path / "run")
    rng = np.random.default_rng(9)
    dataset.commit([write_unit(dataset, "later", [counting_row(f"n{i}", rng) for i in range(30)])])
    assert trained(recipe).resumed_from == 8
    assert losses_of(tmp_path / "run") == before
    assert load_model(tmp_path / "run")[2]["dataset_version"] == 2
