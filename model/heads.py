"""The three heads and their losses as one function: each head at its own positions only, in bounded memory.

Enters: hidden states [T, D], the targets of each modality, the heads. Leaves: the weighted loss, and its parts. Always
holds: no more than `chunk_tokens` rows of logits exist at once, forward or backward. The gradient is made with the loss,
while the logits are there, so that nothing is computed twice; it is there for one backward pass.

Shapes: T tokens of all rows, D hidden, C targets of one modality, V its vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.batch import IGNORE_INDEX, Targets
from model.elementwise import has_kernels
from model.products import accumulates_in_float32, add_product_


def head_losses(
    hidden: Tensor,
    targets: list[Targets],
    weights: list[Tensor],
    coefficients: Tensor,
    z_weight: float,
    chunk_tokens: int,
    groups: Tensor | None = None,
    group_count: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of all heads.

    Args:
        hidden: [T, D].
        targets: of each head.
        weights: [V, D] each.
        coefficients: float32 at least, [heads]: what one target of each counts.
        z_weight: of the squared log-partition beside the negative log likelihood.
        groups: int64 [T], the group of each position, below `group_count`; None is one group.

    Returns:
        The sum over heads and targets of coefficient x (nll + z_weight x log_partition^2), to differentiate; and without
        gradient, by head, the sums of nll and of log_partition^2, and by group and head the sums of nll.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weights = hidden.to(dtype), [weight.to(dtype) for weight in weights]
    return _HeadLosses.apply(hidden, targets, coefficients, z_weight, chunk_tokens, groups, group_count, *weights)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        targets: list[Targets],
        coefficients: Tensor,
        z_weight: float,
        chunk_tokens: int,
        groups: Tensor | None,
        group_count: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        differentiate = any(ctx.needs_input_grad)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses, squares = torch.zeros(2, len(weights), dtype=wide, device=hidden.device)
        by_group = torch.zeros(group_count, len(weights), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if differentiate else None
        grads = [torch.zeros_like(weight, dtype=wide) if differentiate else None for weight in weights]
        for head, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            buffer = logits_buffer(hidden, weight, min(chunk_tokens, len(target.ids)))
            for positions, ids in zip(
                target.positions.split(chunk_tokens), target.ids.split(chunk_tokens), strict=True
            ):
                here = hidden.index_select(0, positions)
                logits = logits_of(here, weight, buffer)
                nll, log_partition = _softmax_loss_(logits, ids, coefficients[head], z_weight)
                losses[head] += nll.sum()
                if groups is not None:
                    # Padded slots have the loss 0, so it does not matter whose they are.
                    by_group[:, head].index_add_(0, groups.index_select(0, positions), nll.to(wide))
                squares[head] += log_partition.square().sum()
                grad_weight = grads[head]
                if grad_hidden is not None and grad_weight is not None:
                    # No position is predicted from twice but 0, by padded slots, which add zeros.
                    grad_hidden.index_add_(0, positions, _input_gradient(logits, weight))
                    for part in _aligned_parts(len(weight)):
                        add_product_(grad_weight[part], logits[:, part].T, here)
        ctx.save_for_backward(*weights)
        ctx.grad_hidden, ctx.grads = grad_hidden, grads
        total = (coefficients * (losses + z_weight * squares)).sum()
        if groups is None:
            by_group[0] = losses
        ctx.mark_non_differentiable(losses, squares, by_group)
        return total, losses, squares, by_group

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_hidden is None:
            raise RuntimeError("a second backward pass through the loss: it keeps nothing after the first")
        grad_hidden, grads = ctx.grad_hidden.mul_(grad_total), ctx.grads
        ctx.grad_hidden = ctx.grads = None
        returned: list[Tensor | None] = []
        for weight, grad in zip(ctx.saved_tensors, grads, strict=True):
            if accumulates_in_float32(weight):
                weight.grad.addcmul_(grad, grad_total)
                returned.append(None)
            else:
                returned.append(grad.mul_(grad_total).to(weight.dtype))
        return grad_hidden, *(None,) * 6, *returned


def _softmax_loss_(logits: Tensor, ids: Tensor, coefficient: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods and log-partitions [C] of logits [C, V], which become the gradient of coefficient x (nll +
    z_weight x log_partition^2). Where there is no target, all of it is 0."""
    if has_kernels(logits):
        from model import triton_elementwise

        return triton_elementwise.softmax_loss_(logits, ids, coefficient, z_weight, IGNORE_INDEX)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = (ids != IGNORE_INDEX).to(wide.dtype)
    log_partition = wide.logsumexp(-1) * valid
    chosen = ids.clamp(min=0)[:, None]
    nll = (log_partition - wide.gather(-1, chosen)[:, 0]) * valid
    scale = coefficient * valid
    grad = (wide - log_partition[:, None]).exp_().mul_((scale * (1 + 2 * z_weight * log_partition))[:, None])
    logits.copy_(grad.scatter_add_(-1, chosen, -scale[:, None]))
    return nll, log_partition


def logits_buffer(hidden: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Room for logits. Rows begin at multiples of 64 numbers, or the fast matrix products could not write them."""
    V = len(weight)
    padded = hidden.new_empty(rows, -(-V // 64) * 64)
    # A CPU's bfloat16 product was seen to read on beyond the row: 0 times what lies there must be 0.
    padded[:, V:] = 0
    return padded[:, :V]


def logits_of(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logits [C, V], in the first rows of a `logits_buffer`."""
    if torch.compiler.is_compiling():  # which takes no output with room between its rows
        return hidden @ weight.T
    logits = buffer[: len(hidden)]
    for part in _aligned_parts(len(weight)):
        torch.mm(hidden, weight[part].T, out=logits[:, part])
    return logits


def _input_gradient(grad_logits: Tensor, weight: Tensor) -> Tensor:
    first, *rest = _aligned_parts(len(weight))
    grad = grad_logits[:, first] @ weight[first]
    for part in rest:
        grad.addmm_(grad_logits[:, part], weight[part])
    return grad


def _aligned_parts(size: int) -> list[slice]:
    """A vocabulary as a multiple of 64 and the rest. For all of 50,257 at once, cuBLAS takes kernels made for Turing, which
    read number by number: 65 ms where 10 are enough (8,192 targets of width 4,096 on an H200)."""
    whole = size // 64 * 64
    return [slice(0, size)] if whole in (0, size) else [slice(0, whole), slice(whole, size)]
