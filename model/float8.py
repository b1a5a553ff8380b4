"""Matrix products in float8: operands rounded to 8 bits with one scale a tensor, sums in float32.

Forward: activations and weights in e4m3. Backward: gradients in e5m2, weights in e4m3; weight gradients stay in the type of
the activations, where they can be added to float32 sums inside the product (`model.products`). The scale of a tensor comes
from its largest number at that moment ("dynamic"), so nothing is kept from step to step. On CUDA the tensor cores
multiply; elsewhere the same rounded numbers are multiplied in float32, for tests.

Source: Micikevicius et al., FP8 Formats for Deep Learning (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.elementwise import has_kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] and a weight [M, K] to [T, M], of x's type."""
    a, a_scale = quantize(x, E4M3)
    b, b_scale = quantize(weight, E4M3)
    return _scaled_product(a, a_scale, b, b_scale, x.dtype, fast=True)


def input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """A gradient [T, M] and a weight [M, K] to [T, K]."""
    a, a_scale = quantize(grad_output, E5M2)
    # The tensor cores take float8 operands along the summed dimension only, so the weight is turned while it is rounded.
    b, b_scale = quantize(weight, E4M3, transpose=True)
    return _scaled_product(a, a_scale, b, b_scale, grad_output.dtype, fast=False)


def quantize(x: Tensor, dtype: torch.dtype, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Round a matrix to float8, after scaling its largest number to the largest there is.

    Returns:
        The matrix, or its transpose, contiguous; and the float32 scalar that it is to be multiplied with again.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).clamp(min=1e-12)
    scale = torch.finfo(dtype).max / largest
    if has_kernels(x):
        from model import triton_float8

        return triton_float8.cast(x, scale, dtype, transpose), scale.reciprocal()
    limit = torch.finfo(dtype).max
    rounded = (x.float() * scale).clamp(-limit, limit).to(dtype)
    return (rounded.T.contiguous() if transpose else rounded), scale.reciprocal()


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why float8 products cannot run on a device beside a type, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"it needs an Ada or Hopper GPU or later and this is {torch.cuda.get_device_name(device)}"
    if dtype != torch.bfloat16:
        return f"its results are bfloat16 and the model computes in {str(dtype).removeprefix('torch.')}"
    return None


def _scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a [T, K] times b [M, K] transposed. `fast` sums in the tensor cores' own registers, of a few bits less."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() @ b.float().T) * (a_scale * b_scale)).to(dtype)
