"""Damaged and foreign checkpoints and models: named with the remedy, never believed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines.pretrain.checkpoint import CheckpointError, verify_checkpoint
from pipelines.pretrain.export import load_model
from pipelines.pretrain.loop import run
from pipelines.pretrain.run import RunResult
from pipelines.sequence import VocabularyError
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import VOCABULARY, write_unit
from tests.pipelines.training import (
    counting_row,
    losses_of,
    run_recipe,
    torch_weights,
    trained,
    unfinished,
)


@pytest.mark.parametrize(
    "fault",
    ["truncated", "flipped", "missing", "no record", "bad record", "edited", "renamed", "foreign", "newer"],
)
def test_of_a_damaged_checkpoint_file_and_remedy_are_named_and_the_run_goes_on_from_the_one_before(
    dataset: Dataset, finished: RunResult, tmp_path: Path, fault: str
) -> None:
    folder = unfinished(finished, tmp_path)
    checkpoint = folder / "checkpoints" / "step-00000012"
    data = next((checkpoint / "state").glob("*.distcp"))
    record = checkpoint / "checkpoint.json"
    remedy = f"; delete the folder {checkpoint}, and the run goes on from the checkpoint before it"
    match fault:
        case "truncated":
            data.write_bytes(data.read_bytes()[:-100])
            expected = f"{data} is damaged or truncated.*{remedy}"
        case "flipped":
            content = bytearray((checkpoint / "state" / ".metadata").read_bytes())
            content[len(content) // 2] ^= 1
            (checkpoint / "state" / ".metadata").write_bytes(bytes(content))
            expected = rf"\.metadata is damaged.*{remedy}"
        case "missing":
            data.unlink()
            expected = f"{data} is missing{remedy}"
        case "no record":
            record.unlink()
            expected = f"{record} is missing, so .* is no Braid checkpoint{remedy}"
        case "bad record":
            record.write_bytes(record.read_bytes()[:200])
            expected = f"{record} is damaged or not Braid's{remedy}"
        case "edited":
            record.write_bytes(record.read_bytes().replace(b'"learning_rate": 0.003', b'"learning_rate": 0.004'))
            expected = f"{record} is damaged: its sha256 is not the one that it names{remedy}"
        case "renamed":
            checkpoint.rename(checkpoint := checkpoint.with_name("step-00000013"))
            expected = "step-00000013/checkpoint.json is of step 12, unlike the name of its folder; delete"
        case "foreign":
            record.write_text(json.dumps({"global_step": 3}))
            expected = f"{record} is damaged or not Braid's{remedy}"
        case _:
            record.write_text(json.dumps(json.loads(record.read_text()) | {"format_version": 99}))
            expected = "written in format 99, this Braid reads 2; use the version"
    with pytest.raises(CheckpointError, match=expected):
        verify_checkpoint(checkpoint)
    if fault == "newer":
        # It is whole, so nothing is thrown away.
        with pytest.raises(CheckpointError, match=expected):
            trained(run_recipe(dataset, folder))
        return
    with (tmp_path / "screen").open("w") as screen:
        assert run(run_recipe(dataset, folder), Console(file=screen)).resumed_from == 8
    said = (tmp_path / "screen").read_text()
    assert "DAMAGED CHECKPOINT" in said
    assert "the run goes on from step-00000008" in said
    assert losses_of(folder) == losses_of(finished.folder)
    # For people to look at; no run goes on from it.
    assert (folder / "checkpoints" / f"damaged-{checkpoint.name}-1").is_dir()
    assert torch_weights(folder) == torch_weights(finished.folder)


def test_without_another_checkpoint_a_damaged_one_means_to_start_over(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = unfinished(finished, tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    checkpoint = folder / "checkpoints" / "step-00000012"
    (checkpoint / "state" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=f"missing; delete the folder {checkpoint}, and the run starts over"):
        trained(run_recipe(dataset, folder))


def test_a_checkpoint_of_another_vocabulary_is_refused(finished: RunResult, tmp_path: Path) -> None:
    folder = unfinished(finished, tmp_path)
    other = Dataset.create(tmp_path / "d", replace(VOCABULARY, image_codebook_size=64), validation_share=0.2)
    rng = np.random.default_rng(0)
    for unit in range(3):
        other.commit([write_unit(other, f"u{unit}", [counting_row(f"{unit}-{i}", rng) for i in range(9)])])
    recipe = (folder / "recipe.yaml").read_text().splitlines()
    moved = [f"  dataset: {tmp_path / 'd'}" if line.strip().startswith("dataset:") else line for line in recipe]
    (folder / "recipe.yaml").write_text("\n".join(moved))
    with pytest.raises(VocabularyError, match=r"image_codebook_size: 32, 64"):
        trained(run_recipe(other, folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json", "braid.json"])
def test_a_truncated_model_is_refused(finished: RunResult, tmp_path: Path, name: str) -> None:
    folder = unfinished(finished, tmp_path) / "model"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is (truncated|damaged).*again"):
        load_model(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(folder)
