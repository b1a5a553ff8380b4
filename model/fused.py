"""A whole block as one function with a backward pass of its own.

`TransformerBlock.forward` in plain PyTorch says what is computed; this says how, so that a GPU does little but matrix
products. Enters: x [T, D] and the block's weights. Leaves: the same as the plain block, to rounding. Always holds:

- Elementwise work is joined to one pass over memory between two products (`model.elementwise`).
- For the backward pass a token keeps 6 D + F numbers a block: x, q, k, v, attention's output, x after attention, and the
  hidden layer before GELU; with norms of queries and keys also what those and the rotation keep. What normalization and GELU
  put out is made again from these, while it is in registers anyway; or it is kept too, 8 D + 2 F, which saves writing it.
- Weight gradients are added to float32 sums inside the products where the weights have such sums (`model.products`).

Shapes: B rows, T tokens of all rows, D hidden, F feed-forward, N heads, H head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import elementwise, products
from model.attention import AttentionPlan, attend
from model.float8 import EXACT, Peaks
from model.rope import rotate

if TYPE_CHECKING:
    from model.block import TransformerBlock
    from model.cache import LayerCache
    from model.config import UnifiedTransformerConfig


class _Kept(NamedTuple):
    """What the backward pass of a block needs beside x and the weights."""

    mean: Tensor
    rstd: Tensor
    leaves: tuple[Tensor, ...]
    """q, k, v [B, T/B, N, H], rotated; with norms of queries and keys neither normed nor rotated, and the norms' weights."""
    mixed: Tensor
    """[B, T/B, N, H], attention's output, with its graph back to the leaves."""
    middle: Tensor
    """[T, D], x after attention."""
    middle_mean: Tensor
    middle_rstd: Tensor
    wide: Tensor | None
    """[T, F], before GELU; None where it is to be computed again."""
    peaks: list[Peaks]
    """Of the four products, with those of their weights alone."""
    normed: Tensor | None = None
    """[T, D], what the first norm put out; this and the next two are None where they are to be made again."""
    middle_normed: Tensor | None = None
    """[T, D]"""
    active: Tensor | None = None
    """[T, F], after GELU."""


class BlockBackendError(RuntimeError):
    """The block backend that the configuration forces cannot run here; the message says why."""


def runs_fused(config: UnifiedTransformerConfig, x: Tensor, training: bool) -> bool:
    """Whether blocks run fused on an input like x, of which only device and type count.

    Raises:
        BlockBackendError: `config.block_backend` asks for it, and it cannot be.
    """
    choice = config.block_backend
    if choice == "torch" or (choice == "auto" and not (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16))):
        return False
    reason = fused_unavailable(config, x, training)
    if choice == "fused" and reason is not None:
        raise BlockBackendError(f"block_backend is 'fused', but {reason}; set it to 'auto' to use what there is")
    return reason is None


def fused_unavailable(config: UnifiedTransformerConfig, x: Tensor, training: bool) -> str | None:
    """Why blocks cannot run fused on an input like x, or None."""
    if config.norm_placement != "pre":
        return f"norm_placement is {config.norm_placement!r}, and the fused block's is 'pre'"
    if config.dropout and training:
        return f"dropout is {config.dropout}, and the fused block drops nothing"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on, and the fused block takes weights and activations of one type"
    if torch.compiler.is_compiling():
        return "the model is being compiled"
    if x.is_cuda and not elementwise.has_triton():
        return "it needs Triton, which comes with torch's CUDA builds"
    return None


def fused_block(x: Tensor, plan: AttentionPlan, block: TransformerBlock, cache: LayerCache | None = None) -> Tensor:
    """What `block` makes of x [B, T, D]; with a cache, which takes the keys and values, without a gradient."""
    attention, feed_forward = block.attention, block.feed_forward
    eps, num_heads = block.attention_norm.eps, attention.config.num_attention_heads
    weights: tuple[Any, ...] = (
        block.attention_norm.weight,
        attention.qkv.weight,
        attention.output.weight,
        block.feed_forward_norm.weight,
        feed_forward.input.weight,
        feed_forward.output.weight,
        *(norm.weight for norm in (attention.query_norm, attention.key_norm) if attention.config.qk_norm),
    )
    if cache is not None:
        return _run(x, plan, eps, num_heads, block.float8, weights, differentiate=False, cache=cache)[0]
    return _FusedBlock.apply(x, plan, eps, num_heads, block.recompute, block.keep, block.float8, *weights)


class _FusedBlock(torch.autograd.Function):
    """Inputs: see `fused_block`; `recompute` and `keep` say what is kept for the backward pass, `float8` what is multiplied
    in. The last two weights are those of the norms of queries and keys, if there are any."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        plan: AttentionPlan,
        eps: float,
        num_heads: int,
        recompute: str,
        keep: str,
        float8: bool,
        *weights: Tensor,
    ) -> Tensor:
        ctx.plan, ctx.eps, ctx.num_heads, ctx.recompute, ctx.float8 = plan, eps, num_heads, recompute, float8
        differentiate = any(ctx.needs_input_grad)
        output, kept = _run(x, plan, eps, num_heads, float8, weights, differentiate=differentiate, keep=keep)
        ctx.save_for_backward(x, *weights)
        if recompute == "all" or not differentiate:
            kept = None
        elif recompute == "feed_forward" and kept is not None:
            kept = kept._replace(wide=None, middle_normed=None, active=None)
        # On the context rather than saved: none of it enters or leaves the function, and it is let go piece by piece.
        ctx.kept = kept
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        norm_weight, qkv_weight, output_weight, middle_norm_weight, in_weight, out_weight, *head_norms = weights
        kept: _Kept | None = ctx.kept
        if kept is None:
            if ctx.recompute != "all":
                raise RuntimeError(
                    "a second backward pass through a fused block; set block_backend to 'torch' for that"
                )
            _, kept = _run(x, ctx.plan, ctx.eps, ctx.num_heads, ctx.float8, weights, differentiate=True, output=False)
            assert kept is not None
        ctx.kept = None
        mean, rstd, leaves, mixed, middle, middle_mean, middle_rstd, wide, peaks, normed, middle_normed, active = kept
        del kept
        qkv_peaks, output_peaks, in_peaks, out_peaks = peaks
        flat, grad = (part.contiguous().flatten(0, 1) for part in (x, grad_output))

        if wide is None:
            middle_normed = elementwise.norm_again(middle, middle_norm_weight, middle_mean, middle_rstd)
            wide = products.product(middle_normed, in_weight, in_peaks)
        qkv_peaks, output_peaks, in_peaks = qkv_peaks.fresh(), output_peaks.fresh(), in_peaks.fresh()
        grad_wide, active = elementwise.gelu_backward_(
            products.input_gradient(grad, out_weight, out_peaks), wide, active, in_peaks.x
        )
        grad_out_weight = products.weight_gradient(out_weight, grad, active)
        del wide, active
        grad_middle, grad_middle_norm, middle_normed = elementwise.norm_backward(
            products.input_gradient(grad_wide, in_weight, in_peaks),
            middle,
            middle_norm_weight,
            middle_mean,
            middle_rstd,
            grad,
            middle_normed,
            output_peaks.x,
        )
        grad_in_weight = products.weight_gradient(in_weight, grad_wide, middle_normed)
        del grad_wide, middle_normed, middle

        grad_mixed = products.input_gradient(grad_middle, output_weight, output_peaks)
        grad_output_weight = products.weight_gradient(output_weight, grad_middle, mixed.detach().reshape(flat.shape))
        grad_q, grad_k, grad_v, *grad_head_norms = torch.autograd.grad(mixed, leaves, grad_mixed.view(mixed.shape))
        del grad_mixed, mixed, leaves
        heads = (flat.shape[0], ctx.num_heads, -1)
        cos, sin = (None, None) if head_norms else _rotation(ctx.plan)
        grad_qkv = elementwise.join_rotated(
            grad_q.reshape(heads), grad_k.reshape(heads), grad_v.reshape(heads), cos, sin, qkv_peaks.x
        ).view(flat.shape[0], -1)
        del grad_q, grad_k, grad_v
        grad_x, grad_norm, normed = elementwise.norm_backward(
            products.input_gradient(grad_qkv, qkv_weight, qkv_peaks),
            flat,
            norm_weight,
            mean,
            rstd,
            grad_middle,
            normed,
        )
        grad_qkv_weight = products.weight_gradient(qkv_weight, grad_qkv, normed)
        return (
            grad_x.view(x.shape),
            *(None,) * 6,
            products.vector_gradient(norm_weight, grad_norm),
            grad_qkv_weight,
            grad_output_weight,
            products.vector_gradient(middle_norm_weight, grad_middle_norm),
            grad_in_weight,
            grad_out_weight,
            *(products.vector_gradient(w, g) for w, g in zip(head_norms, grad_head_norms, strict=True)),
        )


def _run(
    x: Tensor,
    plan: AttentionPlan,
    eps: float,
    num_heads: int,
    float8: bool,
    weights: tuple[Tensor, ...] | list[Tensor],
    *,
    differentiate: bool,
    keep: str = "least",
    output: bool = True,
    cache: LayerCache | None = None,
) -> tuple[Tensor, _Kept | None]:
    """The forward pass. Without `output` it stops before the last product, and what it returns first means nothing."""
    norm_weight, qkv_weight, output_weight, middle_norm_weight, in_weight, out_weight, *head_norms = weights
    B, length, D = x.shape
    flat = x.contiguous().flatten(0, 1)
    all_peaks = [Peaks.of(w) if float8 else EXACT for w in (qkv_weight, output_weight, in_weight, out_weight)]
    qkv_peaks, in_peaks, out_peaks = (all_peaks[i].fresh() for i in (0, 2, 3))
    besides: dict[str, Tensor] = {}
    keeps_all = differentiate and keep == "all"
    normed, mean, rstd = elementwise.norm(flat, norm_weight, eps, qkv_peaks.x)
    qkv = products.product(normed, qkv_weight, qkv_peaks).view(B * length, 3, num_heads, D // num_heads)
    if keeps_all:
        besides["normed"] = normed
    del normed
    cos, sin = _rotation(plan)
    if cos is not None and sin is not None and not head_norms:
        elementwise.rotate_(qkv, cos, sin)
    # Attention keeps its own autograd graph, whichever backend it is; the block's backward pass runs it.
    parts = [part.view(B, length, num_heads, -1) for part in qkv.detach().unbind(1)]
    leaves = tuple(part.detach().requires_grad_(differentiate) for part in (*parts, *head_norms))
    with torch.set_grad_enabled(differentiate):
        q, k, v = _normed_heads(leaves, plan, eps)
        if cache is not None:
            k, v = cache.update(k, v, plan.positions)
        mixed = attend(q, k, v, plan)
    middle = products.product(mixed.detach().reshape(B * length, D), output_weight, all_peaks[1])
    middle_normed, middle_mean, middle_rstd = elementwise.add_norm_(middle, flat, middle_norm_weight, eps, in_peaks.x)
    wide = products.product(middle_normed, in_weight, in_peaks)
    if keeps_all:
        besides["middle_normed"] = middle_normed
    del middle_normed
    result = x
    if output:
        active = elementwise.gelu(wide, out_peaks.x)
        if keeps_all:
            besides["active"] = active
        result = products.product(active, out_weight, out_peaks).add_(middle).view(x.shape)
    if not differentiate:
        return result, None
    return result, _Kept(mean, rstd, leaves, mixed, middle, middle_mean, middle_rstd, wide, all_peaks, **besides)


def _normed_heads(leaves: tuple[Tensor, ...], plan: AttentionPlan, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention takes them; what is left to do is done in plain PyTorch."""
    q, k, v, *head_norms = leaves
    if head_norms:
        query_weight, key_weight = head_norms
        q = F.layer_norm(q, q.shape[-1:], query_weight, None, eps)
        k = F.layer_norm(k, k.shape[-1:], key_weight, None, eps)
        if plan.rotation is not None:
            q, k = rotate(q, *plan.rotation).to(v.dtype), rotate(k, *plan.rotation).to(v.dtype)
    return q, k, v


def _rotation(plan: AttentionPlan) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines [T, H/2] of all rows' tokens."""
    if plan.rotation is None:
        return None, None
    cos, sin = (part.flatten(0, -2) for part in plan.rotation)
    return cos, sin
