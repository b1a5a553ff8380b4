"""What lies between the matrix products of a block, each a single pass over memory.

Enters: activations [T, D] of any floating type. Leaves: the same type; sums are made in float32 at least. On CUDA the
Triton kernels of `model.triton_elementwise` run, elsewhere the formulas below in PyTorch, which are also what the kernels
are tested against. Always holds: functions whose name ends in `_` overwrite what their text says they overwrite; and a
`peak`, a float32 scalar, is raised to the largest magnitude in what the next product takes, for `model.float8` to scale by.

Shapes: T tokens, D hidden, N heads, H head size.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take a tensor: on CUDA, no wider than their float32, and not while a graph is traced."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton() and not torch.compiler.is_compiling()


@lru_cache
def has_triton() -> bool:
    """It comes with torch's CUDA builds for Linux."""
    return importlib.util.find_spec("triton") is not None


class Normed(NamedTuple):
    """A LayerNorm's output and what its backward pass needs."""

    output: Tensor
    """[T, D]"""
    mean: Tensor
    """[T], float32 at least."""
    rstd: Tensor
    """[T], float32 at least: one over the standard deviation."""


def norm(x: Tensor, weight: Tensor, eps: float, peak: Tensor | None = None) -> Normed:
    """LayerNorm without bias over the last dimension of x [T, D] (Ba et al., 2016)."""
    if has_kernels(x):
        from model import triton_elementwise

        return Normed(*triton_elementwise.norm(x, None, weight, eps, peak))
    wide = _wide(x)
    mean = wide.mean(-1)
    rstd = (wide.var(-1, correction=0) + eps).rsqrt()
    return Normed(raise_(peak, _normalized(x, mean, rstd, weight)), mean, rstd)


def add_norm_(y: Tensor, x: Tensor, weight: Tensor, eps: float, peak: Tensor | None = None) -> Normed:
    """Overwrite y with x + y, and normalize that."""
    if has_kernels(x):
        from model import triton_elementwise

        return Normed(*triton_elementwise.norm(y, x, weight, eps, peak))
    return norm(y.add_(x), weight, eps, peak)


def norm_again(x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The output of `norm` once more, from its statistics."""
    return _normalized(x, mean, rstd, weight)


def norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_residual: Tensor,
    output: Tensor | None = None,
    peak: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward pass of `norm`, joined with the gradient that goes around it.

    Args:
        grad_output: [T, D], gradient of the norm's output.
        grad_residual: [T, D], gradient of x that did not pass through the norm.
        output: the norm's, if it was kept.
        peak: raised to the largest magnitude in the gradient of x.

    Returns:
        Gradient of x [T, D], both parts; gradient of the weight [D], float32 at least; the norm's output, made again if it
        was not kept, which the next matrix product's weight gradient needs.
    """
    if has_kernels(x):
        from model import triton_elementwise

        return triton_elementwise.norm_backward(grad_output, x, weight, mean, rstd, grad_residual, output, peak)
    grad, unit = _wide(grad_output), (_wide(x) - mean[:, None]) * rstd[:, None]
    grad_weight = (grad * unit).sum(0)
    scaled = grad * _wide(weight)
    grad_x = (scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)) * rstd[:, None]
    grad_x = raise_(peak, (grad_x + _wide(grad_residual)).to(x.dtype))
    return grad_x, grad_weight, (unit * _wide(weight)).to(x.dtype) if output is None else output


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Overwrite the queries and keys in qkv [T, 3, N, H] with what `model.rope.rotate` makes of them.

    Args:
        cos, sin: [T, H/2], float32 at least.
    """
    if has_kernels(qkv):
        from model import triton_elementwise

        return triton_elementwise.rotate_(qkv, cos, sin)
    first, second = _wide(qkv[:, :2]).chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    qkv[:, :2] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    return qkv


def join_rotated(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    peak: Tensor | None = None,
) -> Tensor:
    """Gradients of the rotated queries and keys and of the values, each [T, N, H], as the gradient of qkv [T, 3, N, H]."""
    if has_kernels(grad_q) and cos is not None and sin is not None:
        from model import triton_elementwise

        return triton_elementwise.join_rotated(grad_q, grad_k, grad_v, cos, sin, peak)
    joined = torch.stack((grad_q, grad_k, grad_v), dim=1)
    return raise_(peak, joined if cos is None or sin is None else rotate_(joined, cos, -sin))


def gelu(h: Tensor, peak: Tensor | None = None) -> Tensor:
    """The exact form (Hendrycks and Gimpel, 2016): x times the normal distribution function of x."""
    if has_kernels(h):
        from model import triton_elementwise

        return triton_elementwise.gelu(h, peak=peak)
    return raise_(peak, torch.nn.functional.gelu(h))


def gelu_backward_(
    grad_output: Tensor, h: Tensor, output: Tensor | None = None, peak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Overwrite grad_output with the gradient of h, whose peak is meant, and h with gelu(h) unless that output was kept.

    Returns:
        The gradient of h, and gelu(h).
    """
    if has_kernels(h):
        from model import triton_elementwise

        return triton_elementwise.gelu_backward_(grad_output, h, output, peak)
    wide = _wide(h)
    below = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    grad_output.copy_(_wide(grad_output) * (below + wide * density))
    if output is None:
        output = h.copy_(wide * below)
    return raise_(peak, grad_output), output


def raise_(peak: Tensor | None, x: Tensor) -> Tensor:
    """Raise a peak, if there is one, to the largest magnitude in x, which is returned; NaN is the largest."""
    if peak is not None:
        torch.maximum(peak, largest(x), out=peak)
    return x


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in x, float32 scalar."""
    return torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return ((_wide(x) - mean[:, None]) * rstd[:, None] * _wide(weight)).to(x.dtype)
