"""What saving costs a run is told, and the memory that makes it cheap is found before it is needed."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipelines.pretrain import saving, staging
from pipelines.pretrain.checkpoint import list_checkpoints, path_of, step_of
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import SAVE, read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunResult
from pipelines.pretrain.staging import Staging
from pipelines.shards.dataset import Dataset
from pipelines.shards.storage import DiskFullError
from tests.pipelines.training import LEAN, losses_of, run_recipe, torch_weights, trained


def _saves(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl", SAVE)


def _state(folder: Path, step: int) -> dict[str, str]:
    files = (path_of(folder / "checkpoints", step) / "state").glob("*.distcp")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _said(recipe: PretrainRecipe, file: Path) -> tuple[RunResult, str]:
    with file.open("w") as screen:
        result = run(recipe, Console(file=screen, width=200))
    return result, file.read_text()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for saves is asked for early and kept, which is otherwise so on GPUs alone."""
    monkeypatch.setattr(saving, "Staging", lambda device, page_locked: Staging(device, page_locked=True))


@pytest.fixture
def memory_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be page-locked without a GPU is ordinary memory."""
    monkeypatch.setattr(staging, "_page_locked", lambda size: mmap.mmap(-1, size))


def test_each_save_tells_how_long_training_paused_for_it(finished: RunResult) -> None:
    told = _saves(finished.folder)
    assert [record["step"] for record in told] == [4, 8, 12]
    for record in told:
        assert 0 <= record["waited_s"] < record["pause_s"] < 60


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_pause_holds_what_training_waited_for(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    write, wait = saving.write_checkpoint, saving.Saver.wait
    slow_s, waits = 0.4, threading.Semaphore(0)

    def slowly(*state: Any) -> Path:
        # Where training does not wait at once, the disk is as slow as it takes until it does.
        assert waits.acquire(timeout=60)
        time.sleep(slow_s)
        return write(*state)

    def waiting(saver: saving.Saver, **how: bool) -> None:
        if saver._running is not None:
            waits.release()
        wait(saver, **how)

    monkeypatch.setattr(saving, "write_checkpoint", slowly)
    monkeypatch.setattr(saving.Saver, "wait", waiting)
    checkpoints = {"every": 1, "asynchronous": asynchronous}
    recipe = run_recipe(dataset, tmp_path / "run", steps=2, schedule={}, checkpoints=checkpoints)
    first, second = _saves(trained(recipe).folder)
    if asynchronous:
        assert first["waited_s"] < slow_s < second["waited_s"] < second["pause_s"]
    else:
        assert min(first["pause_s"], second["pause_s"]) > slow_s
        assert second["waited_s"] < slow_s


def test_a_copy_has_the_bytes_of_the_state_and_keeps_them(memory_of_any_kind: None) -> None:
    for page_locked in (True, False):
        weight = torch.randn(5, 3, dtype=torch.bfloat16)
        moments = {
            "step": torch.tensor(7.0),
            "low": torch.randint(-9, 9, (5, 3), dtype=torch.int16),
            "none": weight[:0],
        }
        state: dict[str, Any] = {"model": {"w": weight}, "optimizer": {"state": moments, "groups": [{"lr": 0.5}]}}
        memory = Staging(torch.device("cpu"), page_locked=page_locked)
        assert memory.ready == (not page_locked)
        if page_locked:
            assert memory.lock(state) == 3 * 64
        copied = memory.copy(state)
        expected = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(state)]
        weight.zero_()
        moments["step"] += 1
        state["optimizer"]["groups"][0]["lr"] = 0.25
        for ours, theirs in zip(tree_leaves(copied), expected, strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
            assert not isinstance(ours, Tensor) or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        again = memory.copy(state)
        assert again["optimizer"]["state"]["step"] == 8
        assert again["optimizer"]["groups"] == [{"lr": 0.25}]
        # Page-locked memory is used again, other memory is each copy's own.
        assert (again["model"]["w"] is copied["model"]["w"]) == page_locked


@pytest.mark.parametrize("kind", [{}, LEAN])
def test_memory_found_early_changes_nothing_that_is_saved(
    dataset: Dataset, tmp_path: Path, as_on_a_gpu: None, memory_of_any_kind: None, kind: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The first save comes right after the first step.
    recipe = run_recipe(dataset, tmp_path / "early", steps=3, schedule={}, checkpoints={"every": 1, "keep": 3}, **kind)
    early, said = _said(recipe, tmp_path / "screen")
    assert len(re.findall(r"GB of host memory page-locked for them, on all ranks together, in \d+\.\d s", said)) == 1
    monkeypatch.undo()
    late = trained(recipe.model_copy(update={"output": str(tmp_path / "late")}))
    for step in (1, 2, 3):
        assert _state(early.folder, step) == _state(late.folder, step) != {}
    assert losses_of(early.folder) == losses_of(late.folder)
    assert torch_weights(early.folder) == torch_weights(late.folder)


def test_a_run_that_gets_no_page_locked_memory_says_so_and_saves(
    dataset: Dataset, finished: RunResult, tmp_path: Path, as_on_a_gpu: None
) -> None:
    if torch.cuda.is_available():
        pytest.skip("page-locks memory")
    result, said = _said(run_recipe(dataset, tmp_path / "run"), tmp_path / "screen")
    assert "NO PAGE-LOCKED MEMORY for checkpoints on 1 of 1 ranks (rank 0: " in said
    assert "each save pauses training several times as long. Give the job more memory" in said
    assert [record["step"] for record in _saves(result.folder)] == [4, 8, 12]
    assert _state(result.folder, 12) == _state(finished.folder, 12)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_save_that_fails_is_said_and_the_last_one_ends_the_run(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, which: int
) -> None:
    write, calls = saving.write_checkpoint, itertools.count(1)

    def full(*state: Any) -> Path:
        if next(calls) == which:
            raise DiskFullError("the disk is full")
        return write(*state)

    monkeypatch.setattr(saving, "write_checkpoint", full)
    recipe = run_recipe(dataset, tmp_path / "run", checkpoints={"every": 4, "asynchronous": asynchronous})
    if which == 3:
        with pytest.raises(DiskFullError):
            trained(recipe)
        assert not (tmp_path / "run/finished.json").exists()
    else:
        assert "NOT SAVED: the disk is full. The run goes on" in _said(recipe, tmp_path / "screen")[1]


def test_what_fails_when_a_checkpoint_is_whole_does_not_end_the_run(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saving, "prune_checkpoints", refuses)
    monkeypatch.setattr("pipelines.pretrain.loop.export_checkpoint", refuses)
    checkpoints = {"every": 4, "export": True}
    result, said = _said(run_recipe(dataset, tmp_path / "run", checkpoints=checkpoints), tmp_path / "screen")
    for word in ("PRUNED", "EXPORTED"):
        for step in (4, 8, 12):
            assert f"NOT {word}: step-{step:08d}: [Errno 13] Permission denied. The checkpoint is whole" in said
    assert [step_of(path) for path in list_checkpoints(result.folder / "checkpoints")] == [4, 8, 12]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_page_locked_after_the_first_step(dataset: Dataset, tmp_path: Path) -> None:
    recipe = run_recipe(dataset, tmp_path / "run", steps=2, schedule={}, device="cuda", precision="bf16")
    _, said = _said(recipe, tmp_path / "screen")
    assert "NO PAGE-LOCKED" not in said
    assert "GB of host memory page-locked" in said
