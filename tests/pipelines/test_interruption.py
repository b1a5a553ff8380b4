"""A run that is told to stop: it saves at the next step, and the same command ends with what an undisturbed one ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.interruption import InterruptedRunError, lost_ranks
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from slurm import context
from slurm.context import LostRanksError
from tests.slurm.training import dataset, faults, steps_done, training_recipe

SILENT = Console(quiet=True)
STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interruption")
    dataset(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    return run(_recipe(folder, "undisturbed"), SILENT).folder


def _recipe(folder: Path, name: str) -> PretrainRecipe:
    small = {"steps": STEPS, "batch": {"sequences": 2, "micro_batch": 2}, "checkpoints": {"every": 1000}}
    return training_recipe(folder / "tokens", folder / name, **small)


def _signal_at(number: int, run_folder: Path, step: int) -> threading.Thread:
    def watch() -> None:
        while steps_done(run_folder) < step:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    folder: Path, undisturbed: Path, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disturbed = _recipe(folder, f"d{number}")
    job = context.JobContext(id="7", folder=tmp_path, restarts=0, rank=0, world_size=1)
    monkeypatch.setattr(context, "_current", job)
    before = signal.getsignal(number)
    watcher = _signal_at(number, Path(disturbed.output), 4)
    with pytest.raises(InterruptedRunError, match=r"saved after step \d+; the same command goes on"):
        run(disturbed, SILENT)
    watcher.join()
    assert signal.getsignal(number) == before
    (saved,) = list_checkpoints(Path(disturbed.output) / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert 4 <= step < STEPS
    assert job.requeued == f"{signal.Signals(number).name}: saved after step {step}"
    assert (tmp_path / "requeue-7-0.json").exists()
    assert run(disturbed, SILENT).resumed_from == step
    assert faults(Path(disturbed.output), undisturbed) == []


def test_a_signal_that_came_while_the_run_was_starting_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = context.JobContext(id="7", folder=tmp_path, restarts=2, rank=0, world_size=1, signals={signal.SIGUSR2})
    monkeypatch.setattr(context, "_current", job)
    recipe = _recipe(folder, "early")
    with pytest.raises(InterruptedRunError):
        run(recipe, SILENT)
    assert [r["step"] for r in read_metrics(Path(recipe.output) / "metrics.jsonl", "train")] == [1]


@pytest.mark.slow
def test_the_command_says_so_without_a_traceback(folder: Path) -> None:
    recipe = _recipe(folder, "command")
    file = folder / "command.yaml"
    file.write_text(recipe.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "pretrain", str(file), "steps=2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    while steps_done(folder / "command") < 5:
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: stopped by SIGTERM, saved after step" in said
    assert "Traceback" not in said


def test_the_end_of_other_ranks_is_told_from_faults_of_this_one() -> None:
    with pytest.raises(LostRanksError), lost_ranks():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.1]:99")
    with pytest.raises(LostRanksError), lost_ranks():
        raise dist.DistBackendError("NCCL communicator was aborted")
    with pytest.raises(RuntimeError, match="size mismatch"), lost_ranks():
        raise RuntimeError("size mismatch")
