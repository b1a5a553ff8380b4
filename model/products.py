"""The matrix products of a linear layer, forward and backward, written out so that their backward pass can be steered.

Enters: activations [T, K] and a weight [M, K]. Leaves: [T, M], and in the backward pass gradients. Always holds: where a
weight has a float32 `grad` beside bfloat16 values, its gradient is added there inside the product itself, in float32, and
never exists in bfloat16 or as a tensor of its own; autograd is then told that there is nothing to add. Which kernel makes a
product on a GPU is torch's choice, or after `tune` that of `model.cublaslt`.

Shapes: T tokens, K features in, M features out.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from model import float8
from model.cublaslt import Fastest
from model.float8 import EXACT, Peaks

_fastest: Fastest | None = None


def tune(on: bool) -> None:
    """Whether this process times the kernels that there are for a product on a GPU when it meets its shape for the first
    time, as `torch.backends.cudnn.benchmark` does for convolutions. It pays where few shapes come often, as in training."""
    global _fastest
    if on != (_fastest is not None):
        _fastest = Fastest() if on else None


def product(x: Tensor, weight: Tensor, peaks: Peaks = EXACT) -> Tensor:
    """[T, K] to [T, M]; with peaks in float8."""
    return _multiply(x, weight.T) if peaks.weight is None else float8.product(x, weight, peaks)


def input_gradient(grad_output: Tensor, weight: Tensor, peaks: Peaks = EXACT) -> Tensor:
    """[T, M] to [T, K]; with peaks in float8."""
    return _multiply(grad_output, weight) if peaks.weight is None else float8.input_gradient(grad_output, weight, peaks)


def weight_gradient(weight: Tensor, grad_output: Tensor, x: Tensor) -> Tensor | None:
    """The gradient [M, K], to be returned to autograd, or None where it was added to `weight.grad` at once."""
    if not accumulates_in_float32(weight):
        return _multiply(grad_output.T, x)
    assert weight.grad is not None
    if _fastest is None or not x.is_cuda:
        add_product_(weight.grad, grad_output.T, x)
    else:
        _fastest(weight.grad, grad_output.T, x, True, add_product_)
    return None


def vector_gradient(weight: Tensor, gradient: Tensor) -> Tensor | None:
    """The same for a gradient that was computed elsewhere, in float32 at least."""
    if not accumulates_in_float32(weight):
        return gradient.to(weight.dtype)
    assert weight.grad is not None
    weight.grad.add_(gradient)
    return None


def accumulates_in_float32(weight: Tensor) -> bool:
    """Whether gradients are to be added to `weight.grad` directly: float32 sums beside weights of less precision."""
    grad = weight.grad if weight.is_leaf else None
    return grad is not None and grad.dtype == torch.float32 and weight.dtype != torch.float32


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 and a, b may be bfloat16: the products are summed in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _adds_in_product(total.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif total.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        # Products of bfloat16 numbers are exact in float32, so this is the same but for the order of the sums.
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if _fastest is None or not a.is_cuda:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    _fastest(out, a, b, False, lambda to, left, right: torch.mm(left, right, out=to))
    return out


@lru_cache
def _adds_in_product(device: torch.device) -> bool:
    """Whether this torch adds a bfloat16 product to a float32 matrix in one go; before 2.11 it may refuse."""
    total = torch.ones(16, 16, device=device)
    a = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, total.dtype, out=total)
    except RuntimeError:
        return False
    return bool((total == 17).all())
