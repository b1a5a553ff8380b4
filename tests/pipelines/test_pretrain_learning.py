"""What is learned: the same in any precision and division, below token frequencies, validated on all that is held out."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import MODALITIES, PackedBatch
from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.export import load_model
from pipelines.pretrain.run import RunResult
from pipelines.shards.dataset import Dataset
from pipelines.shards.split import is_validation
from tests.pipelines.corpora import VOCABULARY, write_unit
from tests.pipelines.training import (
    LEAN,
    assert_close,
    counting_row,
    losses_of,
    run_recipe,
    torch_weights,
    trained,
)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"sequences": 4, "micro_batch": 4}},
        {"recompute_every": 1},
        pytest.param({"compile": True, "recompute_every": 2}, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_recomputation_and_compilation_change_no_loss(
    dataset: Dataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = run_recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0}
    plain, other = (
        trained(run_recipe(dataset, tmp_path / name, steps=3, model=model, **more)).folder
        for name, more in (("plain", {}), ("other", change))
    )
    assert_close(losses_of(other), losses_of(plain))


def test_bf16_follows_fp32(dataset: Dataset, tmp_path: Path, finished: RunResult) -> None:
    half = trained(run_recipe(dataset, tmp_path / "bf16", precision="bf16"))
    assert half.validation is not None
    assert finished.validation is not None
    assert dict(half.validation.items()) == pytest.approx(dict(finished.validation.items()), rel=0.02)


@pytest.mark.parametrize("blocks", ["torch", "fused"])
def test_bf16_weights_with_masters_in_the_optimizer_follow_fp32_and_go_on(
    dataset: Dataset, tmp_path: Path, finished: RunResult, blocks: str
) -> None:
    model = run_recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0, "block_backend": blocks}
    recipe = run_recipe(dataset, tmp_path / "lean", model=model, **LEAN)
    lean = trained(recipe)
    assert lean.validation is not None
    assert finished.validation is not None
    assert dict(lean.validation.items()) == pytest.approx(dict(finished.validation.items()), rel=0.05)
    before, weights = losses_of(lean.folder), torch_weights(lean.folder)
    (lean.folder / "finished.json").unlink()
    last = list_checkpoints(lean.folder / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    assert trained(recipe).resumed_from == 8
    assert losses_of(lean.folder) == before
    assert torch_weights(lean.folder) == weights


def test_a_model_learns_every_modality_below_its_token_frequencies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0.1)
    dataset.commit([write_unit(dataset, "u", [counting_row(str(i), rng) for i in range(300)])])
    recipe = run_recipe(
        dataset, tmp_path / "run", steps=80, optimizer={"learning_rate": 1e-2}, checkpoints={"every": 100}
    )
    result = trained(recipe)
    assert result.validation is not None
    assert result.baseline is not None
    reference = dict(result.baseline.items())
    reached = dict(result.validation.items())
    assert set(reached) == {"text", "image", "audio", "audio/0", "audio/1"}
    assert all(reached[name] < 0.7 * reference[name] for name in reached), (reached, reference)


def _frequencies(dataset: Dataset, *, validation: bool) -> dict[str, Counter[int]]:
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("text", "image", "audio/0", "audio/1")}
    for batch in dataset.read():
        for row in batch.to_pylist():
            if is_validation(row["source"], dataset.validation_share) != validation:
                continue
            for token, modality in list(zip(row["token_ids"], row["modality_ids"], strict=True))[1:]:
                counts[("text", "image", f"audio/{token // 16}")[modality]][token] += 1
    return counts


def test_the_baseline_is_the_smoothed_unigram_of_the_training_split(dataset: Dataset, finished: RunResult) -> None:
    train, held_out = (_frequencies(dataset, validation=v) for v in (False, True))
    sizes = {"text": VOCABULARY.text_vocab_size, "image": 32, "audio/0": 16, "audio/1": 16}
    assert finished.baseline is not None
    found = dict(finished.baseline.items())
    for name, size in sizes.items():
        total = sum(train[name].values()) + size
        expected = -sum(n * math.log((train[name][t] + 1) / total) for t, n in held_out[name].items())
        assert found[name] == pytest.approx(expected / sum(held_out[name].values()), rel=1e-9)


def test_validation_is_the_mean_over_all_held_out_tokens(dataset: Dataset, finished: RunResult) -> None:
    model, _, _ = load_model(finished.folder)
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for batch in dataset.read():
        for row in batch.to_pylist():
            if not is_validation(row["source"], dataset.validation_share):
                continue
            # One document alone in a row, so neither packing nor the loader has a part in this.
            alone = PackedBatch.from_tensors(torch.tensor([row["token_ids"]]), torch.tensor([row["modality_ids"]]))
            with torch.no_grad():
                losses = model.token_losses(alone)
            for name in MODALITIES:
                sums[name] += losses[name].double().sum().item()
                counts[name] += alone.targets[name].count
    assert finished.validation is not None
    for name in MODALITIES:
        assert getattr(finished.validation, name) == pytest.approx(sums[name] / counts[name], rel=1e-5)


def test_without_validation_documents_there_is_no_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0)
    dataset.commit([write_unit(dataset, "u", [counting_row(str(i), rng) for i in range(20)])])
    result = trained(run_recipe(dataset, tmp_path / "run", steps=3))
    assert result.validation is None
    assert result.baseline is None
    assert trained(run_recipe(dataset, tmp_path / "run", steps=3)).already_finished
