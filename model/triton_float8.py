"""The cast of `model.float8` as one Triton kernel: a tile is read once, and written as it lies or turned."""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


@triton.jit
def _cast_kernel(x, scale, out, rows, columns, LIMIT: tl.constexpr, TURN: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    there = (row < rows) & (column < columns)
    values = tl.load(x + row * columns + column, mask=there, other=0.0).to(tl.float32) * tl.load(scale)
    values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT).to(out.dtype.element_ty)
    if TURN:
        turned_row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        turned_column = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
        there = (turned_row < columns) & (turned_column < rows)
        tl.store(out + turned_row * rows + turned_column, tl.trans(values), mask=there)
    else:
        tl.store(out + row * columns + column, values, mask=there)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """x times scale, rounded to float8; with `transpose` turned. x [rows, columns] is contiguous."""
    rows, columns = x.shape
    out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=dtype, device=x.device)
    _cast_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
        x, scale, out, rows, columns, LIMIT=torch.finfo(dtype).max, TURN=transpose, TILE=_TILE, num_warps=4
    )
    return out
