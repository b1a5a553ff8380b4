"""What a step tells by modality, against values worked out from full logits in float64."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from model import MODALITIES, PackedBatch, UnifiedTransformer, UnifiedTransformerConfig
from pipelines.loading import StepBatch
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.parallelize import build_model, join_ranks
from pipelines.pretrain.step import forward_backward
from pipelines.pretrain.telemetry import by_modality
from tests.model.cases import random_rows, tiny_config

WEIGHTS = {"text": 1.0, "image": 0.5, "audio": 2.0}


def told_and_weights(
    config: UnifiedTransformerConfig, batches: list[PackedBatch], **settings: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The telemetry of one step over micro batches, and the weights that the model had.

    Args:
        settings: of `build_model`.
    """
    step = StepBatch(
        micro_batches=tuple(batches),
        sources=tuple(torch.zeros(len(batch.token_ids), dtype=torch.int64) for batch in batches),
        tokens=sum(batch.token_ids.numel() for batch in batches),
        slots=sum(batch.token_ids.numel() for batch in batches),
        after=None,  # type: ignore[arg-type]
    )
    with join_ranks("cpu") as ranks:
        model = build_model(config, ranks, seed=4, **settings)  # type: ignore[arg-type]
        losses = forward_backward(model, step, WEIGHTS, ranks, Datasets(["drawings"]))
        told = by_modality(model, losses)
        values = model.state_dict().items()
        return told, {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values}


def expected_of(
    config: UnifiedTransformerConfig, weights: dict[str, torch.Tensor], batches: list[PackedBatch]
) -> dict[str, Any]:
    """The same from one loss over all logits of all micro batches, in float64."""
    model = UnifiedTransformer(config)
    model.load_state_dict(weights)
    model.double()
    loss, scale = torch.zeros((), dtype=torch.float64), 0.0
    log_partitions: dict[str, list[float]] = {name: [] for name in MODALITIES}
    for batch in batches:
        hidden = model.hidden_states(batch.token_ids, batch.modality_ids, cu_seqlens=batch.cu_seqlens).flatten(0, 1)
        for name in MODALITIES:
            valid = batch.targets[name].ids >= 0
            logits = (hidden @ model.head_weight(name).T)[batch.targets[name].positions[valid]]
            log_partition = logits.exp().sum(-1).log()
            nll = F.nll_loss(logits - log_partition[:, None], batch.targets[name].ids[valid], reduction="sum")
            loss = loss + WEIGHTS[name] * (nll + config.z_loss_weight * log_partition.square().sum())
            scale += WEIGHTS[name] * int(valid.sum())
            log_partitions[name] += log_partition.tolist()
    (loss / scale).backward()

    def norm(weight: torch.Tensor) -> float:
        assert weight.grad is not None
        return math.sqrt(sum(value**2 for value in weight.grad.flatten().tolist()))

    return {
        "gradient_norm": {
            "head": {name: norm(head.get_parameter("weight")) for name, head in model.heads.items()},
            "embedding": {name: norm(model.embeddings[name].get_parameter("weight")) for name in MODALITIES},
        },
        "log_partition": {
            name: math.sqrt(sum(value**2 for value in values) / len(values)) if values else None
            for name, values in log_partitions.items()
        },
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    for part in ("head", "embedding"):
        assert found["gradient_norm"][part] == pytest.approx(expected["gradient_norm"][part], rel=rel)
    for name, value in expected["log_partition"].items():
        assert found["log_partition"][name] == (None if value is None else pytest.approx(value, rel=rel))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("precision", "masters", "rel"), [("fp32", "parameters", 1e-5), ("bf16", "optimizer", 0.01)])
def test_gradient_norms_and_log_partitions_are_those_of_full_logits_in_float64(
    precision: str, masters: str, rel: float, tied: bool
) -> None:
    config = tiny_config(tie_text_embeddings=tied, z_loss_weight=0.1, loss_chunk_tokens=5)
    batches = [
        PackedBatch.from_sequences(random_rows(lengths, seed=seed), length=20, capacity=40)
        for seed, lengths in enumerate([[[5, 9, 1], [20]], [[12], [3, 8]]])
    ]
    told, weights = told_and_weights(config, batches, precision=precision, masters=masters)
    expected = expected_of(config, weights, batches)
    assert set(told["gradient_norm"]["head"]) == set(MODALITIES) - ({"text"} if tied else set())
    assert_same(told, expected, rel)
    # The modalities' figures are apart, or a mix-up would pass.
    for figures in (*expected["gradient_norm"].values(), expected["log_partition"]):
        assert all(abs(a / b - 1) > 2 * rel for a, b in combinations(figures.values(), 2))


def test_a_modality_that_a_step_does_not_hold_has_no_log_partition_and_gradients_of_norm_0() -> None:
    config = tiny_config()
    batches = [PackedBatch.from_sequences(random_rows([[9, 4], [16]], modalities=(0, 2)), capacity=40)]
    told, weights = told_and_weights(config, batches, precision="fp32")
    assert told["log_partition"]["image"] is None
    assert told["gradient_norm"]["head"]["image"] == told["gradient_norm"]["embedding"]["image"] == 0
    assert_same(told, expected_of(config, weights, batches), rel=1e-5)
