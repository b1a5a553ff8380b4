"""What the loss is: next-token losses of three heads, weighted and normalised to one number.

    total = sum over m of w[m] (S[m] + z Z[m])  /  sum over m of w[m] n[m]

S[m] sums the negative log likelihoods of modality m, Z[m] the squared log-partitions, z is `z_loss_weight`, w are weights,
and n[m] is the denominator: how many valid targets of m the whole optimizer step holds, over all ranks and accumulated
batches (default: this batch alone). So each target weighs w[m], however the step is divided, provided that gradients are
*summed* over ranks and accumulated batches. FSDP2 averages over ranks unless told otherwise. `model.heads` computes it.

Shapes: C targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import IGNORE_INDEX, Targets
from model.config import MODALITIES
from model.heads import logits_buffer, logits_of


class LossOutput(NamedTuple):
    """The loss of one batch. A tuple, because FSDP2 looks for the tensors to hook inside tuples."""

    total: Tensor
    """Scalar to call `backward` on: weighted, normalised, z-loss included."""
    sums: dict[str, Tensor]
    """By modality, detached scalar: sum of the negative log likelihoods, in nats; unweighted, without z-loss."""
    counts: dict[str, int]
    """By modality: number of valid targets in this batch. `sums[m] / counts[m]` is the mean loss."""
    z_loss: Tensor
    """Detached scalar: the part of `total` that is z-loss."""
    squares: dict[str, Tensor]
    """By modality, detached scalar: sum of the squared log-partitions of the targets' logits."""
    group_sums: Tensor
    """[groups, modalities], detached: `sums` by the caller's groups of rows; without any, all rows are one group."""


def coefficients_of(
    denominators: Mapping[str, float | Tensor], weights: Mapping[str, float] | None, like: Tensor
) -> Tensor:
    """What one target of each modality counts in the total, [3] in the order of `MODALITIES`.

    Args:
        denominators: by modality, numbers or scalar tensors (a tensor is never waited for). A step without any target has
            denominator 1 and so loss 0.
        weights: by modality, default 1; a name left out has weight 1.
        like: decides the device; the result is float32, or float64 for a float64 tensor.
    """
    w = dict.fromkeys(MODALITIES, 1.0) | dict(weights or {})
    unknown = sorted((set(w) | set(denominators)) - set(MODALITIES))
    if unknown or set(denominators) != set(MODALITIES):
        raise ValueError(
            f"weights name {sorted(weights or {})} and denominators {sorted(denominators)}: the modalities are "
            f"{', '.join(MODALITIES)}, and denominators must give all of them"
        )
    scale: float | Tensor = sum(w[name] * denominators[name] for name in MODALITIES)
    dtype = torch.promote_types(like.dtype, torch.float32)
    # Filled on the device, number by number: a list would be copied there, and the host would wait.
    numbers = torch.stack([torch.full((), w[name], dtype=dtype, device=like.device) for name in MODALITIES])
    if isinstance(scale, Tensor):
        return numbers / torch.where(scale > 0, scale, 1.0).to(numbers)
    return numbers / (scale or 1.0)


def target_losses(hidden: Tensor, targets: Targets, weight: Tensor, chunk_tokens: int) -> Tensor:
    """Negative log likelihood of each target, never holding more than `chunk_tokens` rows of logits.

    Args:
        hidden: [T, D], hidden states of all positions.
        weight: [V, D], the head.

    Returns:
        [C], float32 (float64 for a float64 model), 0 where there is no target.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    buffer = logits_buffer(hidden, weight, min(chunk_tokens, len(targets.ids)))
    chunks = [
        _losses(logits_of(hidden.index_select(0, positions), weight, buffer), ids)
        for positions, ids in zip(targets.positions.split(chunk_tokens), targets.ids.split(chunk_tokens), strict=True)
    ]
    return torch.cat(chunks)


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, ids, ignore_index=IGNORE_INDEX, reduction="none")
