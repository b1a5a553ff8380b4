"""One optimizer step, from a rank's batch to its gradients.

Enters: a `StepBatch`. Leaves: gradients on the parameters, and `Losses` over all ranks. Always holds: every target of the
global batch weighs the same within its modality, however the batch is divided among ranks and micro batches; the host
never waits for the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from model import MODALITIES
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer

if TYPE_CHECKING:
    from pipelines.loading import StepBatch


@dataclass(frozen=True, slots=True)
class Losses:
    """Next-token losses of a step over all ranks, on the device."""

    sums: Tensor
    """float64 [3]: negative log likelihood in nats, by modality."""
    counts: Tensor
    """int64 [3]: targets, by modality."""
    squares: Tensor
    """float64 [3]: squared log-partitions of the targets' logits, by modality."""
    tokens: Tensor
    """int64 scalar: tokens that are not padding."""
    dataset_sums: Tensor
    """float64 [datasets, 3]: `sums` by dataset."""
    dataset_counts: Tensor
    """int64 [datasets, 3]: `counts` by dataset."""


def forward_backward(
    model: ShardedTransformer,
    batch: StepBatch,
    weights: Mapping[str, float],
    ranks: Ranks,
    datasets: Datasets,
    *,
    reshard_after_backward: bool = True,
) -> Losses:
    """Add the gradients of a rank's share of the step, averaged over ranks by FSDP2 where it shards the model.

    Args:
        weights: of each modality's targets.
        datasets: that the batch may be from.
        reshard_after_backward: see `ShardingSettings`; after the last micro-batch weights are always given up.
    """
    micro_batches = batch.micro_batches
    rows = [datasets.of_rows(sources) for sources in batch.sources]
    mine = torch.stack([datasets.counts(b, row) for b, row in zip(micro_batches, rows, strict=True)]).sum(0)
    told = torch.cat([mine.flatten(), torch.tensor([batch.tokens])])
    *by_dataset, tokens = ranks.sum(told.to(ranks.device, non_blocking=True))
    dataset_counts = torch.stack(by_dataset).view_as(mine)
    counts = dataset_counts.sum(0)
    # FSDP2 averages over ranks where the loss wants a sum.
    denominators = {name: count / ranks.world_size for name, count in zip(MODALITIES, counts, strict=True)}
    sums = torch.zeros(2 + len(datasets), len(MODALITIES), dtype=torch.float64, device=ranks.device)
    for number, (micro_batch, row) in enumerate(zip(micro_batches, rows, strict=True), start=1):
        # Gradients travel between ranks once a step.
        if isinstance(model, FSDPModule):
            last = number == len(micro_batches)
            model.set_requires_gradient_sync(last)
            if not reshard_after_backward:
                model.set_reshard_after_backward(last)
        loss = model.loss(
            micro_batch.to(ranks.device, non_blocking=True),
            weights=weights,
            denominators=denominators,
            # Of one dataset nothing needs to be summed apart.
            row_groups=row.to(ranks.device, non_blocking=True) if len(datasets) > 1 else None,
            group_count=len(datasets),
        )
        loss.total.backward()
        parts = torch.stack([part[name] for part in (loss.sums, loss.squares) for name in MODALITIES]).view(2, -1)
        sums += torch.cat([parts, loss.group_sums])
    losses, squares, *dataset_sums = ranks.sum(sums)
    return Losses(losses, counts, squares, tokens, torch.stack(dataset_sums), dataset_counts)


def clip_gradients(model: ShardedTransformer, largest: float) -> Tensor:
    """Scale all gradients so that their norm is at most `largest`; returns the norm before, a scalar on the device."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step of one rank.

    So no random state needs saving: a resumed step draws what it would have drawn, whatever ran before it.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
