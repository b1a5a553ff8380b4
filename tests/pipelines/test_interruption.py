"""A run that is told to stop: it saves at the next step, and the same command ends with what an undisturbed one ends with."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from pipelines.pretrain import loop
from pipelines.pretrain.checkpoint import list_checkpoints, step_of
from pipelines.pretrain.interruption import InterruptedRunError, Interruption, lost_ranks
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.parallelize import Ranks
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


def _signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int) -> None:
    """This process gets a signal while it takes that step."""
    take, steps = loop.take_step, itertools.count(1)

    def taking(*arguments: Any) -> None:
        take(*arguments)
        if next(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "take_step", taking)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    folder: Path, undisturbed: Path, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disturbed = _recipe(folder, f"d{number}")
    job = context.JobContext(id="7", folder=tmp_path, restarts=0, rank=0, world_size=1)
    monkeypatch.setattr(context, "_current", job)
    before = signal.getsignal(number)
    _signal_in_step(monkeypatch, number, 4)
    with pytest.raises(InterruptedRunError, match=r"saved after step 4; the same command goes on"):
        run(disturbed, SILENT)
    assert signal.getsignal(number) == before
    assert [step_of(path) for path in list_checkpoints(Path(disturbed.output) / "checkpoints")] == [4]
    assert job.requeued == f"{signal.Signals(number).name}: saved after step 4"
    assert (tmp_path / "requeue-7-0.json").exists()
    assert run(disturbed, SILENT).resumed_from == 4
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


@pytest.mark.parametrize("order", [(signal.SIGUSR2, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR2)])
def test_of_two_signals_before_a_boundary_the_one_sent_ahead_of_time_is_told(order: tuple[signal.Signals, ...]) -> None:
    alone = Ranks(0, 1, torch.device("cpu"), cast(DeviceMesh, None))
    with Interruption(alone) as interruption:
        for number in order:
            os.kill(os.getpid(), number)
        assert interruption.agreed()
        with pytest.raises(InterruptedRunError, match="stopped by SIGUSR2"):
            interruption.stop(1)


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
