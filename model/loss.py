"""Next-token loss of one head, in bounded memory, and how the heads' losses become one number.

Shapes: C targets, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.batch import IGNORE_INDEX
from model.config import MODALITIES


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


def target_losses(hidden: Tensor, weight: Tensor, ids: Tensor, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Negative log likelihood and log-partition of each target, never holding more than `chunk_tokens` rows of logits.

    With more targets than one chunk, the backward pass computes each chunk's logits again instead of keeping them.

    Args:
        hidden: [C, D], the hidden states that predict.
        weight: [V, D], the head.
        ids: int64 [C]; `IGNORE_INDEX` where there is no target.

    Returns:
        Two tensors [C], float32 (float64 for a float64 model), 0 where there is no target: -log p(id), and
        log sum exp(logits).
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    losses, log_partitions = _TargetLosses.apply(hidden, weight, ids, chunk_tokens)
    # Padded slots stay connected, with gradient 0: a head gets a gradient from a batch without its modality too.
    valid, zero = ids != IGNORE_INDEX, losses.new_zeros(())
    return torch.where(valid, losses, zero), torch.where(valid, log_partitions, zero)


class _TargetLosses(torch.autograd.Function):
    """Linear layer and cross entropy in one, because apart they hold the logits and their gradient several times over.

    With p the softmax of a row, its gradient is p (g_loss + g_log_partition), less g_loss at the target.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        ids = ids.clamp(min=0)
        buffer = _logits_buffer(hidden, weight, chunk_tokens)
        log_partition, chosen = buffer.new_empty(2, len(ids)).unbind()
        for rows in _chunks(len(ids), chunk_tokens):
            logits = _logits(hidden[rows], weight, buffer)
            log_partition[rows] = logits.logsumexp(dim=-1)
            chosen[rows] = logits.gather(-1, ids[rows, None])[:, 0]
        logits_of_only_chunk = buffer if len(ids) <= chunk_tokens else None
        ctx.save_for_backward(hidden, weight, ids, log_partition, logits_of_only_chunk)
        ctx.chunk_tokens = chunk_tokens
        return log_partition - chosen, log_partition

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_log_partition: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, ids, log_partition, kept = ctx.saved_tensors
        chunks = _chunks(len(ids), ctx.chunk_tokens)
        buffer = torch.empty_like(kept) if kept is not None else _logits_buffer(hidden, weight, ctx.chunk_tokens)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype if len(chunks) > 1 else weight.dtype)
        for rows in chunks:
            logits = kept if kept is not None else _logits(hidden[rows], weight, buffer)
            grad = torch.sub(logits, log_partition[rows, None], out=buffer[: len(logits)]).exp_()
            grad.mul_((grad_loss + grad_log_partition)[rows, None])
            grad.scatter_add_(1, ids[rows, None], -grad_loss[rows, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            if grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits_buffer(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(min(len(hidden), chunk_tokens), len(weight), dtype=dtype)


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    out = buffer[: len(hidden)]
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    return out.copy_(hidden @ weight.T)


def combine(
    losses: Mapping[str, tuple[Tensor, Tensor]],
    counts: Mapping[str, int],
    *,
    weights: Mapping[str, float] | None,
    denominators: Mapping[str, float | Tensor] | None,
    z_loss_weight: float,
) -> LossOutput:
    """Weighted mean over all targets: sum over modalities m of w[m] (S[m] + z Z[m]), over sum of w[m] n[m].

    S[m] sums the negative log likelihoods of modality m, Z[m] the squared log-partitions, z is `z_loss_weight`, and
    n[m] is the denominator: how many valid targets of m the whole optimizer step holds, over all ranks and accumulated
    batches (default: this batch alone). So each target weighs w[m], however the step is divided, provided that
    gradients are *summed* over ranks and accumulated batches. FSDP2 averages over ranks unless told otherwise.

    Args:
        losses: `target_losses` by modality.
        weights: by modality, default 1; a name left out has weight 1.
        denominators: by modality, numbers or scalar tensors (a tensor is never waited for). A step without any target
            has denominator 1 and so loss 0.
    """
    w = dict.fromkeys(MODALITIES, 1.0) | dict(weights or {})
    n = counts if denominators is None else denominators
    unknown = sorted((set(w) | set(n)) - set(MODALITIES))
    if unknown or set(n) != set(MODALITIES):
        raise ValueError(
            f"weights name {sorted(weights or {})} and denominators {sorted(n)}: the modalities are "
            f"{', '.join(MODALITIES)}, and denominators must give all of them"
        )
    scale: float | Tensor = sum(w[name] * n[name] for name in MODALITIES)
    scale = torch.where(scale > 0, scale, 1.0) if isinstance(scale, Tensor) else scale or 1.0
    sums = {name: nll.sum() for name, (nll, _) in losses.items()}
    squares = {name: log_partition.square().sum() for name, (_, log_partition) in losses.items()}
    z_loss = z_loss_weight * torch.stack([w[name] * squares[name] for name in MODALITIES]).sum() / scale
    total = torch.stack([w[name] * sums[name] for name in MODALITIES]).sum() / scale + z_loss
    return LossOutput(total, {name: value.detach() for name, value in sums.items()}, dict(counts), z_loss.detach())
