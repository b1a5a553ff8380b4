"""Matrix products in float8: operands rounded to 8 bits with one scale a tensor, sums in float32.

Forward: activations and weights in e4m3. Backward: gradients in e5m2, weights in e4m3; weight gradients stay in the type of
the activations, where they can be added to float32 sums inside the product (`model.products`). The scale of a tensor comes
from its largest number at that moment ("dynamic"), so nothing is kept from step to step; who writes a tensor measures it
meanwhile, and a weight is measured once for both directions (`Peaks`). On CUDA the tensor cores multiply; elsewhere the
same rounded numbers are multiplied in float32, for tests.

Source: Micikevicius et al., FP8 Formats for Deep Learning (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.elementwise import has_kernels, largest

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

SMALLEST_PEAK = 1e-12
"""Of less, the scale would leave float32; zeros stay zeros with any."""


class Peaks(NamedTuple):
    """The largest magnitudes of a product's operands, float32 scalars."""

    x: Tensor | None
    """Of the activations or the gradient; None where they are to be measured when they are rounded."""
    weight: Tensor | None
    """None where the product is not made in float8."""

    @classmethod
    def of(cls, weight: Tensor) -> Peaks:
        """Those of products by a weight."""
        return cls(None, largest(weight))

    def fresh(self) -> Peaks:
        """The same with a zero for x, to be raised by who writes x (`model.elementwise`)."""
        return self if self.weight is None else self._replace(x=torch.zeros_like(self.weight))


EXACT = Peaks(None, None)
"""Not in float8."""


def product(x: Tensor, weight: Tensor, peaks: Peaks) -> Tensor:
    """x [T, K] and a weight [M, K] to [T, M], of x's type."""
    a, a_scale = quantize(x, E4M3, peaks.x)
    b, b_scale = quantize(weight, E4M3, peaks.weight)
    return _scaled_product(a, a_scale, b, b_scale, x.dtype, fast=True)


def input_gradient(grad_output: Tensor, weight: Tensor, peaks: Peaks) -> Tensor:
    """A gradient [T, M] and a weight [M, K] to [T, K]."""
    a, a_scale = quantize(grad_output, E5M2, peaks.x)
    # The tensor cores take float8 operands along the summed dimension only, so the weight is turned while it is rounded.
    b, b_scale = quantize(weight, E4M3, peaks.weight, transpose=True)
    return _scaled_product(a, a_scale, b, b_scale, grad_output.dtype, fast=False)


def quantize(
    x: Tensor, dtype: torch.dtype, peak: Tensor | None = None, transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Round a contiguous matrix to float8, after scaling its largest number to the largest there is.

    Args:
        peak: the magnitude of its largest number, float32 scalar; None to measure it.

    Returns:
        The matrix, or its transpose, contiguous; and the float32 scalar that it is to be multiplied with again.
    """
    peak = largest(x) if peak is None else peak
    if has_kernels(x):
        from model import triton_float8

        return triton_float8.quantize(x, peak, dtype, transpose)
    limit = torch.finfo(dtype).max
    # Not limit / peak: torch makes that limit x (1 / peak), which rounds twice.
    scale = torch.full_like(peak, limit) / peak.clamp(min=SMALLEST_PEAK)
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
