"""A real disk that is full while a run saves: the last checkpoint stays, and the run goes on when there is room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.pretrain import saving
from pipelines.pretrain.checkpoint import list_checkpoints, verify_checkpoint
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.run import RunResult
from pipelines.shards.dataset import Dataset
from pipelines.shards.storage import DiskFullError
from tests.pipelines.disks import fill, small_disk
from tests.pipelines.training import losses_of, run_recipe, torch_weights, trained

_LEFT = 100_000
"""Bytes for metrics, less than a checkpoint takes."""


@pytest.mark.parametrize("left", [_LEFT, 0])
def test_a_disk_that_is_full_while_saving_keeps_the_last_checkpoint_and_the_run_goes_on(
    dataset: Dataset, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    with small_disk(tmp_path / "disk", 4_000_000) as disk:
        recipe = run_recipe(dataset, disk / "run", checkpoints={"every": 4, "asynchronous": False})
        write, fillers = saving.write_checkpoint, []

        def filling(folder: Path, state: Any, *more: Any) -> Path:
            if state.step == 8 and not fillers:
                fillers.append(fill(disk, left))
            return write(folder, state, *more)

        monkeypatch.setattr(saving, "write_checkpoint", filling)
        # With room for the metrics alone it is the second checkpoint in a row, without any the next line of metrics.
        with pytest.raises(DiskFullError, match=f"{disk}.*the disk is full.*Free space"):
            trained(recipe)
        checkpoints = disk / "run/checkpoints"
        assert [p.name for p in checkpoints.iterdir()] == ["step-00000004"]
        verify_checkpoint(checkpoints / "step-00000004")
        assert 8 <= read_metrics(disk / "run/metrics.jsonl", "train")[-1]["step"] <= 12
        fillers[0].unlink()
        assert trained(recipe).resumed_from == 4
        assert losses_of(disk / "run") == losses_of(finished.folder)
        assert torch_weights(disk / "run") == torch_weights(finished.folder)
        assert [p.name for p in list_checkpoints(checkpoints)] == ["step-00000008", "step-00000012"]
