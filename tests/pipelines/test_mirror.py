"""Checkpoints that are copied elsewhere: a run whose machine is gone goes on from them, and ends as it would have."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines.pretrain.checkpoint import list_checkpoints, step_of, verify_checkpoint
from pipelines.pretrain.loop import run
from pipelines.pretrain.mirror import Copying, Mirror
from pipelines.pretrain.parallelize import Ranks
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError
from pipelines.shards.dataset import Dataset
from pipelines.shards.storage import Storage
from tests.pipelines.corpora import make_dataset, random_row, write_unit
from tests.pipelines.stores import object_store
from tests.pipelines.training import SILENT, losses_of, run_recipe, torch_weights, trained

S3 = "s3://bucket/runs/mine"


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "tokens", units=2, rows=20)


def _mirrored(dataset: Dataset, output: Path, mirror: str) -> PretrainRecipe:
    return run_recipe(dataset, output, checkpoints={"every": 4, "keep": 2, "mirror": mirror})


def _said(recipe: PretrainRecipe, tmp_path: Path) -> str:
    with (tmp_path / "screen").open("w") as screen:
        run(recipe, Console(file=screen, width=200))
    return (tmp_path / "screen").read_text()


@pytest.mark.parametrize("where", ["s3", "disk"])
def test_a_run_whose_folder_is_gone_goes_on_from_the_mirror(dataset: Dataset, tmp_path: Path, where: str) -> None:
    undisturbed = trained(run_recipe(dataset, tmp_path / "undisturbed"))
    with object_store():
        mirror = S3 if where == "s3" else str(tmp_path / "elsewhere/mine")
        recipe = _mirrored(dataset, tmp_path / "run", mirror)
        trained(recipe)
        copies = Mirror(mirror, tmp_path / "run", 2, print)
        assert copies.steps() == [8, 12]
        # The machine is lost before it is done: the last checkpoint had not come there yet.
        Storage.of(f"{mirror}/step-00000012").delete("checkpoint.json")
        assert copies.steps() == [8]
        shutil.rmtree(tmp_path / "run")
        # What came to the dataset since is no data of this run.
        rng = np.random.default_rng(7)
        dataset.commit([write_unit(dataset, "new", [random_row(f"new{i}", rng) for i in range(20)])])
        said = _said(recipe, tmp_path)
        assert "step-00000008 comes from" in said
        assert "Going on from step 8 of 12" in said
        assert losses_of(tmp_path / "run") == losses_of(undisturbed.folder)
        assert torch_weights(tmp_path / "run") == torch_weights(undisturbed.folder)
        assert copies.steps() == [8, 12]
        for path in list_checkpoints(tmp_path / "run/checkpoints"):
            verify_checkpoint(path)
        assert not list((tmp_path / "run").rglob(".*fetched*"))


def test_a_folder_that_holds_checkpoints_takes_none_from_the_mirror(dataset: Dataset, tmp_path: Path) -> None:
    recipe = _mirrored(dataset, tmp_path / "run", str(tmp_path / "mirror"))
    trained(recipe)
    copies = Mirror(str(tmp_path / "mirror"), tmp_path / "run", 2, print)
    assert copies.restore() is None
    (tmp_path / "run/finished.json").unlink()
    assert copies.restore() is None
    # A run that went back writes a step anew: what is later there is of no run any more.
    copies.put(list_checkpoints(tmp_path / "run/checkpoints")[0])
    assert copies.steps() == [8]


def test_a_store_that_refuses_is_told_before_anything_is_trained(dataset: Dataset, tmp_path: Path) -> None:
    with object_store():
        recipe = _mirrored(dataset, tmp_path / "run", "s3://no-such-bucket/mine")
        with pytest.raises(RunError, match=r"checkpoints\.mirror = s3://no-such-bucket/mine: .*no-such-bucket"):
            run(recipe, SILENT)
    assert not list((tmp_path / "run").rglob("step-*"))


def test_a_full_mirror_is_said_and_the_next_checkpoint_is_copied_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile, calls = shutil.copyfile, iter(range(100))

    def full(source: Path, target: Path) -> None:
        if "mirror" in str(target) and next(calls) == 0:
            raise OSError(28, "No space left on device")
        copyfile(source, target)

    monkeypatch.setattr("pipelines.shards.storage.shutil.copyfile", full)
    said = _said(_mirrored(dataset, tmp_path / "run", str(tmp_path / "mirror")), tmp_path)
    assert re.search(r"NOT MIRRORED: step-00000004: .*the disk is full", said)
    assert Mirror(str(tmp_path / "mirror"), tmp_path / "run", 2, print).steps() == [8, 12]


def test_a_mirror_slower_than_training_is_not_waited_for_until_the_end_and_gets_the_newest(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, trained_on, copied = Mirror.put, threading.Event(), []

    def slowly(mirror: Mirror, checkpoint: Path) -> None:
        assert trained_on.wait(60)
        put(mirror, checkpoint)
        verify_checkpoint(checkpoint)
        copied.append(step_of(checkpoint))

    settle = Copying.settle

    def settling(copying: Copying, ranks: Ranks, alive: Callable[[], None]) -> None:
        trained_on.set()
        settle(copying, ranks, alive)

    monkeypatch.setattr(Mirror, "put", slowly)
    monkeypatch.setattr(Copying, "settle", settling)
    checkpoints = {"every": 2, "keep": 2, "mirror": str(tmp_path / "mirror")}
    trained(run_recipe(dataset, tmp_path / "run", checkpoints=checkpoints))
    # The first was begun with, and stayed for that; of the others only the newest two could wait.
    assert copied == [2, 10, 12]
    assert Mirror(str(tmp_path / "mirror"), tmp_path / "run", 2, print).steps() == [10, 12]


def test_a_mirror_that_cannot_be_written_to_any_more_is_said(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Mirror, "_put", stale)
    said = _said(_mirrored(dataset, tmp_path / "run", str(tmp_path / "mirror")), tmp_path)
    assert said.count("NOT MIRRORED: ") == 3
    assert "[Errno 116] Stale file handle. The checkpoint is whole in" in said
