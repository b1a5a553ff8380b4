"""The rounding of `model.float8` in Triton: each number is read once, and written where it lies or turned."""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.float8 import SMALLEST_PEAK

_TILE = 64
_FLAT = 8192
"""Elements of one program where shapes do not matter."""


@triton.jit
def _scale(peak, inverse, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, FIRST):
    """What to multiply by, for all programs; the first one writes down its inverse. NaN stays NaN."""
    largest = tl.load(peak)
    scale = tl.div_rn(tl.full((), LIMIT, tl.float32), tl.where(largest < SMALLEST, SMALLEST, largest))
    if FIRST:
        tl.store(inverse, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    return scale


@triton.jit
def _rounded(values, scale, out, LIMIT: tl.constexpr):
    return tl.clamp(values.to(tl.float32) * scale, -LIMIT, LIMIT).to(out.dtype.element_ty)


@triton.jit
def _flat_kernel(x, peak, out, inverse, size, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    scale = _scale(peak, inverse, LIMIT, SMALLEST, tl.program_id(0) == 0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(out + at, _rounded(values, scale, out, LIMIT), mask=at < size)


@triton.jit
def _turning_kernel(
    x, peak, out, inverse, rows, columns, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, TILE: tl.constexpr
):
    scale = _scale(peak, inverse, LIMIT, SMALLEST, (tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
    turned_row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    turned_column = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    there = (turned_row < columns) & (turned_column < rows)
    tl.store(out + turned_row * rows + turned_column, tl.trans(_rounded(values, scale, out, LIMIT)), mask=there)


def quantize(x: Tensor, peak: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor]:
    """See `model.float8.quantize`."""
    rows, columns = x.shape
    out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=dtype, device=x.device)
    inverse = torch.empty_like(peak)
    limit = torch.finfo(dtype).max
    if transpose:
        _turning_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
            x, peak, out, inverse, rows, columns, LIMIT=limit, SMALLEST=SMALLEST_PEAK, TILE=_TILE, num_warps=4
        )
    else:
        _flat_kernel[(triton.cdiv(x.numel(), _FLAT),)](
            x, peak, out, inverse, x.numel(), LIMIT=limit, SMALLEST=SMALLEST_PEAK, BLOCK=_FLAT, num_warps=8
        )
    return out, inverse
