"""Triton kernels of `model.elementwise`, for CUDA; TRITON_INTERPRET=1 runs them on the CPU, for tests.

What lies between a block's matrix products is bound by memory, so each kernel reads every input once and writes every
output once. One program holds whole rows, sums in float32 in a fixed order: equal input gives equal bits. A `peak` is
raised to the largest magnitude that was written, by an atomic maximum, whose order does not matter.

Shapes: T tokens, D hidden, N heads, H head size.
"""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLAT = 4096
"""Elements of one program where shapes do not matter."""


@lru_cache
def _programs(device: torch.device) -> int:
    """As many as keep every multiprocessor busy while each still sums many rows."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def _magnitude(values, out):
    """The bits of what values come to once they are rounded as `out` is: ordered as the magnitudes, NaN above all."""
    return tl.abs(values.to(out.dtype.element_ty).to(tl.float32)).to(tl.int32, bitcast=True)


@triton.jit
def _norm_kernel(
    x, residual, weight, output, means, rstds, peak, eps, D, ADD: tl.constexpr, PEAK: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < D
    values = tl.load(x + row * D + column, mask=there, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * D + column, mask=there, other=0.0).to(tl.float32)
        # What the next layers see is the rounded sum, so its statistics are taken of that.
        rounded = values.to(x.dtype.element_ty)
        tl.store(x + row * D + column, rounded, mask=there)
        values = rounded.to(tl.float32)
    mean = tl.sum(values, 0) / D
    centred = tl.where(there, values - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    values = centred * rstd * scale
    tl.store(output + row * D + column, values.to(output.dtype.element_ty), mask=there)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)
    if PEAK:
        tl.atomic_max(peak, tl.max(_magnitude(values, output), 0), sem="relaxed")


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, peak: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x [T, D]; with a residual, x is first overwritten with the sum of both."""
    T, D = x.shape
    output = torch.empty_like(x)
    means, rstds = torch.empty(2, T, device=x.device, dtype=torch.float32)
    _norm_kernel[(T,)](
        x, x if residual is None else residual, weight, output, means, rstds, _bits(peak, means), eps, D,
        ADD=residual is not None, PEAK=peak is not None, BLOCK=triton.next_power_of_2(D), num_warps=_warps(D),
    )  # fmt: skip
    return output, means, rstds


@triton.jit
def _norm_backward_kernel(
    grad_output, x, weight, means, rstds, grad_residual, grad_x, output, grad_weights, peak, T, D,
    ROWS: tl.constexpr, AGAIN: tl.constexpr, PEAK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < D
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for step in range(ROWS):
        row = program * ROWS + step
        at = row * D + column
        here = there & (row < T)
        grad = tl.load(grad_output + at, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        around = tl.load(grad_residual + at, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=row < T, other=0.0)
        mean = tl.load(means + row, mask=row < T, other=0.0)
        unit = tl.where(here, (values - mean) * rstd, 0.0)
        total += grad * unit
        scaled = grad * scale
        along = tl.sum(scaled * unit, 0) / D
        grad = (scaled - tl.sum(scaled, 0) / D - unit * along) * rstd + around
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=here)
        if AGAIN:
            tl.store(output + at, (unit * scale).to(output.dtype.element_ty), mask=here)
        largest = tl.maximum(largest, tl.where(here, _magnitude(grad, grad_x), 0))
    if PEAK:
        tl.atomic_max(peak, tl.max(largest, 0), sem="relaxed")
    tl.store(grad_weights + program * D + column, total, mask=there)


def norm_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    means: Tensor,
    rstds: Tensor,
    grad_residual: Tensor,
    output: Tensor | None,
    peak: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model.elementwise.norm_backward`."""
    T, D = x.shape
    rows = triton.cdiv(T, _programs(x.device))
    programs = triton.cdiv(T, rows)
    grad_x, again = torch.empty_like(x), output is None
    output = torch.empty_like(x) if output is None else output
    grad_weights = torch.empty(programs, D, device=x.device, dtype=torch.float32)
    _norm_backward_kernel[(programs,)](
        grad_output, x, weight, means, rstds, grad_residual, grad_x, output, grad_weights, _bits(peak, means), T, D,
        ROWS=rows, AGAIN=again, PEAK=peak is not None, BLOCK=triton.next_power_of_2(D), num_warps=_warps(D),
    )  # fmt: skip
    return grad_x, grad_weights.sum(0), output


@triton.jit
def _rotated(base, cos, sin, there, HALF):
    """A tile of pairs at `base` and `base + HALF`, turned."""
    first = tl.load(base, mask=there, other=0.0).to(tl.float32)
    second = tl.load(base + HALF, mask=there, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _rotate_kernel(
    q, k, v, out, cosines, sines, peak, N, HALF,
    JOIN: tl.constexpr, PEAK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One token. Without JOIN q, k and out are one array [T, 3, N, H]; with it q, k, v are [T, N, H] each."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)[None, :]
    there = (head < N) & (pair < HALF)
    cos = tl.load(cosines + token * HALF + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sines + token * HALF + pair, mask=pair < HALF, other=0.0)
    size = N * 2 * HALF
    at = head * 2 * HALF + pair
    to = out + token * 3 * size + at
    if JOIN:
        from_q, from_k, from_v = q + token * size + at, k + token * size + at, v + token * size + at
        sin = -sin
    else:
        from_q, from_k, from_v = q + token * 3 * size + at, k + token * 3 * size + size + at, v + at
    first, second = _rotated(from_q, cos, sin, there, HALF)
    largest = tl.maximum(_magnitude(first, out), _magnitude(second, out))
    tl.store(to, first.to(out.dtype.element_ty), mask=there)
    tl.store(to + HALF, second.to(out.dtype.element_ty), mask=there)
    first, second = _rotated(from_k, cos, sin, there, HALF)
    largest = tl.maximum(largest, tl.maximum(_magnitude(first, out), _magnitude(second, out)))
    tl.store(to + size, first.to(out.dtype.element_ty), mask=there)
    tl.store(to + size + HALF, second.to(out.dtype.element_ty), mask=there)
    if JOIN:
        first = tl.load(from_v, mask=there, other=0.0)
        second = tl.load(from_v + HALF, mask=there, other=0.0)
        largest = tl.maximum(largest, tl.maximum(_magnitude(first, out), _magnitude(second, out)))
        tl.store(to + 2 * size, first, mask=there)
        tl.store(to + 2 * size + HALF, second, mask=there)
    if PEAK:
        tl.atomic_max(peak, tl.max(largest), sem="relaxed")


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `model.elementwise.rotate_`; qkv, cos and sin are contiguous."""
    _rotate(qkv, qkv, qkv, qkv, cos, sin, None, join=False)
    return qkv


def join_rotated(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, peak: Tensor | None
) -> Tensor:
    """See `model.elementwise.join_rotated`."""
    T, N, H = grad_q.shape
    joined = torch.empty(T, 3, N, H, device=grad_q.device, dtype=grad_q.dtype)
    _rotate(grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), joined, cos, sin, peak, join=True)
    return joined


def _rotate(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, cos: Tensor, sin: Tensor, peak: Tensor | None, *, join: bool
) -> None:
    T, _, N, H = out.shape
    _rotate_kernel[(T,)](
        q, k, v, out, cos, sin, _bits(peak, cos), N, H // 2, JOIN=join, PEAK=peak is not None,
        BLOCK_N=triton.next_power_of_2(N), BLOCK_H=triton.next_power_of_2(H // 2), num_warps=4,
    )  # fmt: skip


@triton.jit
def normal(x):
    """The normal distribution function at x, within 2e-7, and the density.

    With `erf` the kernels below are bound by its arithmetic and not by memory; this formula takes half the instructions and
    shares its exponential with the density. Source: Abramowitz and Stegun (1964), 26.2.17.
    """
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    t = 1 / (1 + 0.2316419 * tl.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    beyond = density * series
    return tl.where(x < 0, beyond, 1 - beyond), density


@triton.jit
def _gelu_kernel(x, output, peak, size, PEAK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    below, _ = normal(values)
    values *= below
    tl.store(output + at, values.to(output.dtype.element_ty), mask=there)
    if PEAK:
        tl.atomic_max(peak, tl.max(_magnitude(values, output), 0), sem="relaxed")


def gelu(h: Tensor, output: Tensor | None = None, peak: Tensor | None = None) -> Tensor:
    """See `model.elementwise.gelu`; h is contiguous, and so is what it is written to, which may be h itself."""
    output = torch.empty_like(h) if output is None else output
    _gelu_kernel[(triton.cdiv(h.numel(), _FLAT),)](
        h, output, _bits(peak, h), h.numel(), PEAK=peak is not None, BLOCK=_FLAT, num_warps=8
    )
    return output


@triton.jit
def _gelu_backward_kernel(grad, x, peak, size, AGAIN: tl.constexpr, PEAK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    arriving = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
    below, density = normal(values)
    leaving = arriving * (below + values * density)
    tl.store(grad + at, leaving.to(grad.dtype.element_ty), mask=there)
    if AGAIN:
        tl.store(x + at, (values * below).to(x.dtype.element_ty), mask=there)
    if PEAK:
        tl.atomic_max(peak, tl.max(_magnitude(leaving, grad), 0), sem="relaxed")


def gelu_backward_(grad_output: Tensor, h: Tensor, output: Tensor | None, peak: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `model.elementwise.gelu_backward_`; both are contiguous."""
    _gelu_backward_kernel[(triton.cdiv(h.numel(), _FLAT),)](
        grad_output, h, _bits(peak, h), h.numel(),
        AGAIN=output is None, PEAK=peak is not None, BLOCK=_FLAT, num_warps=8,
    )  # fmt: skip
    return grad_output, h if output is None else output


@triton.jit
def _softmax_loss_kernel(
    logits, ids, coefficient, z_weight, losses, log_partitions, ignored,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One target: its loss and log-partition; its logits become the gradient of coefficient (loss + z log_partition^2)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * STRIDE
    column = tl.arange(0, BLOCK)
    # Largest value and sum of each lane as they pass, joined once at the end.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        there = first + column < V
        values = tl.load(start + first + column, mask=there, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, values)
        # A lane that has seen nothing yet holds -inf, and -inf - -inf is no number.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.exp(values - base)
        largest = larger
    top = tl.max(largest, 0)
    log_partition = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    target = tl.load(ids + row)
    valid = target != ignored
    target = tl.where(valid, target, 0)
    chosen = tl.load(start + target).to(tl.float32)
    tl.store(losses + row, tl.where(valid, log_partition - chosen, 0.0))
    tl.store(log_partitions + row, tl.where(valid, log_partition, 0.0))
    scale = tl.where(valid, tl.load(coefficient), 0.0)
    each = scale * (1 + 2 * z_weight * log_partition)
    # The target's own logit was read above, by every thread, before any is overwritten below.
    tl.debug_barrier()
    for first in range(0, V, BLOCK):
        there = first + column < V
        values = tl.load(start + first + column, mask=there, other=float("-inf")).to(tl.float32)
        grad = each * tl.exp(values - log_partition) - tl.where(first + column == target, scale, 0.0)
        tl.store(start + first + column, grad.to(logits.dtype.element_ty), mask=there)


def softmax_loss_(
    logits: Tensor, ids: Tensor, coefficient: Tensor, z_weight: float, ignored: int
) -> tuple[Tensor, Tensor]:
    """See `model.loss._softmax_loss_`; rows of logits are contiguous."""
    C, V = logits.shape
    losses, log_partitions = torch.empty(2, C, device=logits.device, dtype=torch.float32)
    _softmax_loss_kernel[(C,)](
        logits, ids, coefficient, z_weight, losses, log_partitions, ignored,
        V=V, STRIDE=logits.stride(0), BLOCK=min(8192, triton.next_power_of_2(V)), num_warps=8 if V >= 4096 else 4,
    )  # fmt: skip
    return losses, log_partitions


def _bits(peak: Tensor | None, instead: Tensor) -> Tensor:
    """A peak as its bits, for numbers of one sign are ordered as these are; without one any address, which is not used."""
    return instead if peak is None else peak.view(torch.int32)


def _warps(size: int) -> int:
    return min(16, max(1, triton.next_power_of_2(size) // 512))
