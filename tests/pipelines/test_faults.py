"""Faults in training: numbers that are none, spikes, a rank that hangs, a full disk, an object store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipelines.loading import Index, Loader
from pipelines.pretrain import checkpoint, loop, saving
from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.faults import Guard, Watchdog, stacks_left
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import FaultSettings
from pipelines.pretrain.step import Losses
from pipelines.shards.dataset import Dataset
from pipelines.shards.storage import DiskFullError
from tests.pipelines.corpora import make_dataset
from tests.pipelines.stores import copy, object_store
from tests.pipelines.training import losses_of, run_recipe, torch_weights, trained


def _at(step: int, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the gradients of one step after they were computed."""
    clip, seen = loop.clip_gradients, iter(range(1, 1000))

    def clipped(model: Any, largest: float) -> Any:
        if next(seen) == step:
            change(next(p for p in model.parameters() if p.grad is not None).grad)
        return clip(model, largest)

    monkeypatch.setattr(loop, "clip_gradients", clipped)


def test_a_step_that_is_not_a_number_changes_nothing_and_is_told(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at(5, monkeypatch, lambda grad: grad.mul_(float("nan")))
    with (tmp_path / "screen").open("w") as screen:
        result = loop.run(run_recipe(dataset, tmp_path / "run"), Console(file=screen))
    train = read_metrics(result.folder / "metrics.jsonl", "train")
    assert [r["step"] for r in train if "fault" in r] == [5]
    assert train[4]["fault"] == "not a number"
    assert train[4]["gradient_norm"] is None
    assert all(r["loss"]["text"] < 10 for r in train)
    assert "step 5: not a number" in (tmp_path / "screen").read_text()
    assert all(torch.isfinite(torch.tensor(w)).all() for w in torch_weights(result.folder).values())


def _told(sums: torch.Tensor, counts: torch.Tensor) -> Losses:
    sums = sums.double()
    return Losses(
        sums=sums,
        counts=counts,
        squares=sums,
        tokens=counts.sum(),
        dataset_sums=sums[None],
        dataset_counts=counts[None],
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_leaves_weights_moments_and_count_as_they_were(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    guard = Guard(FaultSettings(), torch.device("cpu"))
    losses = _told(torch.ones(3), torch.ones(3, dtype=torch.int64))
    for norm in (1.0, float("inf"), 1.0):
        weight.grad = torch.ones(3) if norm == 1.0 else torch.full((3,), float("inf"))
        before = weight.detach().clone()
        verdict = guard.check(losses, torch.tensor(norm))
        loop.take_step(optimizer, verdict)
        assert int(verdict) == (norm != 1.0)
        assert torch.equal(weight, before) == (norm != 1.0)
    assert int(optimizer.state[weight]["step"]) == 2


@pytest.mark.parametrize(("spikes", "verdict"), [("record", 3), ("skip", 2)])
def test_a_loss_beyond_six_sigma_is_a_spike_of_its_modality(spikes: Any, verdict: int) -> None:
    guard = Guard(FaultSettings(spikes=spikes), torch.device("cpu"))
    noise = torch.Generator().manual_seed(0)
    counts = torch.tensor([10, 10, 0])

    def check(audio_and_text: torch.Tensor) -> int:
        return int(guard.check(_told(audio_and_text * counts, counts), torch.tensor(1.0)))

    for _ in range(200):
        usual = torch.tensor([5.0, 2.0, 0.0]) + 0.1 * torch.randn(3, generator=noise)
        assert check(usual.double()) == 0
    state = guard.state_dict()
    assert check(torch.tensor([5.0, 2.9, 0.0]).double()) == verdict
    # A spike does not become usual by having been there.
    assert guard.state_dict() == state
    assert check(torch.tensor([5.0, 2.1, 0.0]).double()) == 0
    other = Guard(FaultSettings(spikes=spikes), torch.device("cpu"))
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_a_rank_that_hangs_writes_its_stacks_and_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipelines.pretrain.faults import Watchdog; from pipelines.pretrain.recipe import FaultSettings\n"
        "def waits_for_ever(): time.sleep(600)\n"
        "with Watchdog(Path(sys.argv[1]), FaultSettings(hang_s=0.5), 3): waits_for_ever()\n"
    )
    root = Path(__file__).parents[2]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    (stacks,) = stacks_left(tmp_path)
    assert stacks.name.startswith("rank-3")
    assert "waits_for_ever" in stacks.read_text()
    assert stacks_left(tmp_path) == []
    with Watchdog(tmp_path, FaultSettings(hang_s=60), 0) as watchdog:
        watchdog.alive()
    assert stacks_left(tmp_path) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which saving meets a full disk."""
    steps: list[int] = []
    write = saving.write_checkpoint

    def failing(folder: Path, state: Any, *more: Any) -> Path:
        if state.step in steps:
            raise DiskFullError(f"{folder}: the disk is full")
        return write(folder, state, *more)

    monkeypatch.setattr(saving, "write_checkpoint", failing)
    return steps


def test_a_checkpoint_that_cannot_be_saved_is_told_and_the_run_goes_on(
    dataset: Dataset, tmp_path: Path, full_disk: list[int]
) -> None:
    full_disk.append(8)
    with (tmp_path / "screen").open("w") as screen:
        loop.run(run_recipe(dataset, tmp_path / "run"), Console(file=screen))
    assert "NOT SAVED" in (tmp_path / "screen").read_text()
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000004", "step-00000012"]


def test_two_in_a_row_end_the_run_and_the_last_good_one_stays(
    dataset: Dataset, tmp_path: Path, full_disk: list[int]
) -> None:
    full_disk.extend([8, 12])
    with pytest.raises(DiskFullError):
        trained(run_recipe(dataset, tmp_path / "run"))
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000004"]
    full_disk.clear()
    assert trained(run_recipe(dataset, tmp_path / "run")).resumed_from == 4
    undisturbed = trained(run_recipe(dataset, tmp_path / "undisturbed"))
    assert losses_of(tmp_path / "run") == losses_of(undisturbed.folder)


def test_a_disk_that_fills_up_leaves_nothing_of_the_checkpoint_and_is_named(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        # As DCP tells of what went wrong on some rank.
        Path(more["checkpoint_id"]).mkdir()
        (Path(more["checkpoint_id"]) / "half").write_bytes(b"x")
        raise RuntimeError("RANKS:[0] Traceback ... OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(DiskFullError, match=r"checkpoints: the disk is full.*those before it are whole"):
        trained(run_recipe(dataset, tmp_path / "run"))
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_run_trains_from_an_object_store_and_goes_on_there(dataset: Dataset, tmp_path: Path) -> None:
    local = trained(run_recipe(dataset, tmp_path / "local"))
    with object_store():
        copy(Path(dataset.uri), "s3://bucket/tokens")
        recipe = run_recipe(dataset, tmp_path / "run")
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dataset": "s3://bucket/tokens"})})
        trained(recipe)
        assert losses_of(tmp_path / "run") == losses_of(local.folder)
        (tmp_path / "run/finished.json").unlink()
        last = list_checkpoints(tmp_path / "run/checkpoints")[-1]
        last.rename(last.with_name("gone"))
        assert trained(recipe).resumed_from == 8
        assert losses_of(tmp_path / "run") == losses_of(local.folder)
        index = Index.build(Dataset.open("s3://bucket/tokens"), 96)
        loader = Loader(index, sequences=4, micro_batch=4, seed=0, window_tokens=4000)
        with loader:
            next(loader)
            state = loader.state_dict()
        with Loader(index, sequences=4, micro_batch=2, seed=0, window_tokens=4000, rank=1, world_size=2) as other:
            other.load_state_dict(state)
            next(other)


def test_a_mixture_of_datasets_trains_validates_and_pins_versions(dataset: Dataset, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", units=2, rows=20, seed=9)
    recipe = run_recipe(dataset, tmp_path / "run")
    values = recipe.model_dump(mode="json")
    values["data"] |= {
        "dataset": "",
        "audio_codebooks": 1,
        "stages": [
            {"mixture": [{"dataset": dataset.uri, "weight": 3.0}, {"dataset": other.uri}], "steps": 5},
            {"mixture": [{"dataset": other.uri}]},
        ],
    }
    recipe = type(recipe).model_validate(values)
    result = trained(recipe)
    assert result.validation is not None
    assert len(result.validation.audio_codebooks) == 1
    (record,) = read_metrics(result.folder / "metrics.jsonl", "validation")[-1:]
    told = record["datasets"]
    assert set(told) == {"tokens", "other"}
    train = read_metrics(result.folder / "metrics.jsonl", "train")
    assert [set(r["datasets"]) for r in train] == [{"tokens", "other"}] * 5 + [{"other"}] * 7
    for r in train:
        parts = [each["image"] for each in r["datasets"].values()]
        assert min(parts) - 1e-6 <= r["loss"]["image"] <= max(parts) + 1e-6
    low, high = sorted([told["tokens"]["image"], told["other"]["image"]])
    assert low < result.validation.image < high  # type: ignore[operator]
    assert "version: 2" in (result.folder / "recipe.yaml").read_text()
    assert trained(recipe).already_finished
