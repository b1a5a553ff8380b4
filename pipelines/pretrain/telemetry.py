"""What tells early that training of several modalities is about to go wrong, by modality.

Enters: a model whose gradients are complete, and a step's `Losses`. Leaves: numbers for `RUN/metrics.jsonl`, kind
`telemetry`. Always holds: every rank measures the same; nothing is changed by measuring.

Norms that grow in one modality and not in another, and logits that drift, come before divergence (Chameleon, 2024, section
2.3; Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import MODALITIES, PackedBatch
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.pretrain.step import Losses


def by_modality(model: ShardedTransformer, losses: Losses) -> dict[str, Any]:
    """What each step tells. Every rank must call it, between the backward pass and clipping."""
    return {"gradient_norm": gradient_norms(model), "log_partition": log_partitions(losses)}


@torch.no_grad()
def gradient_norms(model: ShardedTransformer) -> dict[str, dict[str, float]]:
    """Norms of the gradients of each head and each embedding, by modality, before clipping. Every rank must call it.

    A text head that is tied to the embedding has no gradient of its own.
    """
    norms = {
        part: {name: _norm(modules[name].get_parameter("weight")) for name in MODALITIES if name in modules}
        for part, modules in (("head", model.heads), ("embedding", model.embeddings))
    }
    return {part: {name: float(norm) for name, norm in by_name.items()} for part, by_name in norms.items()}


def log_partitions(losses: Losses) -> dict[str, float | None]:
    """Root mean square of the log-partition of each modality's logits, which the z-loss holds down; None without targets."""
    pairs = zip(MODALITIES, losses.squares.tolist(), losses.counts.tolist(), strict=True)
    return {name: (square / count) ** 0.5 if count else None for name, square, count in pairs}


def attention_peaks(model: ShardedTransformer, batch: PackedBatch, ranks: Ranks) -> dict[str, Any]:
    """The largest attention logit of each layer, on the first row of each rank's batch. Every rank must call it."""
    peaks = model.attention_peaks(batch.to(ranks.device, non_blocking=True))
    gathered = torch.zeros(ranks.world_size, len(peaks), device=ranks.device)
    gathered[ranks.rank] = peaks
    return {"attention_logits": ranks.sum(gathered).amax(0).tolist()}


def _norm(weight: Tensor) -> Tensor:
    if weight.grad is None:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
