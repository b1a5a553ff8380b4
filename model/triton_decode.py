"""Triton kernels of `model.decode`: one token a row through a block; TRITON_INTERPRET=1 runs them on the CPU, for tests.

A step for few rows is bound by reading every weight once, so a kernel's business is to keep many wide loads in flight and
to leave little between it and the next one. Always holds: sums are float32 in a fixed order, so equal input gives equal
bits; what a kernel reads before `gdc_wait` was written before the step began, so that with programmatic dependent launch
(PDL: a kernel's programs start while the last ones of the kernel before it end) nothing is read too early.

Shapes: B rows, D hidden, K features in, M features out, N heads, H head size, S slots of the cache.
"""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803, SIM108

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.triton_elementwise import normal

MOST_ROWS = 2
"""Rows that `product` takes; above, tensor cores are wanted."""


class Tiles(NamedTuple):
    """How one matrix is cut."""

    block_m: int
    """Rows of the matrix in a program."""
    block_k: int
    """Columns loaded at once."""
    num_warps: int
    num_stages: int
    """Loads in flight through shared memory; 1 goes through registers."""


def tiles_of(M: int, K: int, B: int) -> Tiles:
    """For a matrix [M, K] and B rows: near the fastest of each of 8b's products on an H200 (benchmarks.generation)."""
    if B > 1:
        return Tiles(8, 1024, 4, 1)
    return Tiles(2, 2048, 8, 1) if K >= 16384 else Tiles(4, 1024, 4, 1)


@triton.jit
def _embed_kernel(
    ids, kinds, lengths, text, image, audio, modalities, places, x, D, PLACES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The embedding of one row's token, rounded where `model.embedding` rounds."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < D
    kind = tl.load(kinds + row)
    index = tl.load(ids + row) * D + column
    values = tl.load(text + index, mask=there & (kind == 0), other=0.0)
    values += tl.load(image + index, mask=there & (kind == 1), other=0.0)
    values += tl.load(audio + index, mask=there & (kind == 2), other=0.0)
    values += tl.load(modalities + kind * D + column, mask=there, other=0.0)
    if PLACES:
        values += tl.load(places + tl.load(lengths + row) * D + column, mask=there, other=0.0)
    tl.store(x + row * D + column, values, mask=there)


def embed(
    ids: Tensor, kinds: Tensor, lengths: Tensor, tables: list[Tensor], modalities: Tensor, places: Tensor | None,
    x: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """Write the embeddings of ids [B] to x [B, D]; table m belongs to modality id m, places to learned positions."""
    B, D = x.shape
    block = min(1024, triton.next_power_of_2(D))
    _embed_kernel[(B, triton.cdiv(D, block))](
        ids, kinds, lengths, *tables, modalities, modalities if places is None else places, x, D,
        PLACES=places is not None, BLOCK=block, PDL=pdl, num_warps=4,
    )  # fmt: skip


@triton.jit
def _statistics(x, D: tl.constexpr, eps, BLOCK: tl.constexpr):
    """Mean and one over the standard deviation of one row."""
    column = tl.arange(0, BLOCK)
    if BLOCK == D:
        values = tl.load(x + column).to(tl.float32)
        mean = tl.sum(values, 0) / D
        centred = values - mean
    else:
        there = column < D
        values = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
        mean = tl.sum(values, 0) / D
        centred = tl.where(there, values - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)


@triton.jit
def _part(w, x, k, scale, mean, rstd, K: tl.constexpr, EVEN: tl.constexpr, NORM: tl.constexpr):
    """What a tile w [BLOCK_M, BLOCK_K] adds to the sums of one row of x, eight columns together: [BLOCK_M, BLOCK_K/8]."""
    if EVEN:
        values = tl.load(x + k).to(tl.float32)
    else:
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        values = (values - mean) * rstd * scale
    products = w * values[None, :]
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // 8, 8)), 2)


@triton.jit
def _finish(total, residual, y, row, m, M: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr):
    out = tl.sum(total, 1)
    if GELU:
        below, _ = normal(out)
        out *= below
    if ADD:
        out += tl.load(residual + row * M + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(y + row * M + m, out.to(y.dtype.element_ty), mask=m < M)


@triton.jit
def _product_kernel(
    x, weight, scale, residual, y, eps, M: tl.constexpr, K: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
    ADD: tl.constexpr, GELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = K % BLOCK_K == 0
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    # A row beyond the last is read from the last: no mask, and nothing of it is stored.
    rows = weight + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    # Weights do not depend on the kernel before, so the first tile is on its way while that one ends.
    if PDL:
        gdc_launch_dependents()
    if EVEN:
        w = tl.load(rows + columns[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(rows + columns[None, :], mask=columns[None, :] < K, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    mean0, rstd0, mean1, rstd1 = 0.0, 1.0, 0.0, 1.0
    if NORM:
        mean0, rstd0 = _statistics(x, K, eps, BLOCK)
        if B > 1:
            mean1, rstd1 = _statistics(x + K, K, eps, BLOCK)
    wide = w.to(tl.float32)
    g = tl.load(scale + columns, mask=columns < K, other=0.0).to(tl.float32) if NORM else 1.0
    total0 = _part(wide, x, columns, g, mean0, rstd0, K, EVEN, NORM)
    if B > 1:
        total1 = _part(wide, x + K, columns, g, mean1, rstd1, K, EVEN, NORM)
    for first in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        k = first + columns
        if EVEN:
            w = tl.load(rows + k[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(rows + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
        wide = w.to(tl.float32)
        g = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32) if NORM else 1.0
        total0 += _part(wide, x, k, g, mean0, rstd0, K, EVEN, NORM)
        if B > 1:
            total1 += _part(wide, x + K, k, g, mean1, rstd1, K, EVEN, NORM)
    _finish(total0, residual, y, 0, m, M, ADD, GELU)
    if B > 1:
        _finish(total1, residual, y, 1, m, M, ADD, GELU)


def product(
    x: Tensor, weight: Tensor, y: Tensor, tiles: Tiles, *, scale: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, gelu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """Write to y [B, M]: residual + gelu(norm(x) @ weight.T), of which norm, GELU and residual are optional.

    Args:
        x: [B, K], at most `MOST_ROWS` rows.
        weight: [M, K].
        scale: [K], the weight of a LayerNorm of x without bias.
        residual: [B, M], may be y itself.
    """
    B, K = x.shape
    M = weight.shape[0]
    block_k = min(tiles.block_k, max(16, triton.next_power_of_2(K)))
    _product_kernel[(triton.cdiv(M, tiles.block_m),)](
        x, weight, x if scale is None else scale, y if residual is None else residual, y, eps, M=M, K=K, B=B,
        NORM=scale is not None, ADD=residual is not None, GELU=gelu, BLOCK_M=tiles.block_m, BLOCK_K=block_k,
        BLOCK=triton.next_power_of_2(K), STAGES=tiles.num_stages, PDL=pdl, num_warps=tiles.num_warps, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    x,
    scale,
    output,
    lengths,
    alive,
    eps,
    D: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
    g = tl.load(scale + column, mask=column < D, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    mean, rstd = _statistics(x + row * D, D, eps, BLOCK)
    values = tl.load(x + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(output + row * D + column, ((values - mean) * rstd * g).to(output.dtype.element_ty), mask=column < D)
    if ADVANCE:
        tl.store(lengths + row, tl.load(lengths + row) + tl.load(alive + row))


def norm(
    x: Tensor, scale: Tensor, eps: float, output: Tensor, *, lengths: Tensor | None = None, alive: Tensor | None = None,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Write LayerNorm(x [B, D]) to output; with lengths int64 [B], add alive int64 [B] to them."""
    B, D = x.shape
    advance = lengths is not None and alive is not None
    block = triton.next_power_of_2(D)
    _norm_kernel[(B,)](
        x, scale, output, lengths if advance else x, alive if advance else x, eps, D=D, ADVANCE=advance, BLOCK=block,
        PDL=pdl, num_warps=min(8, max(1, block // 512)), launch_pdl=pdl,
    )  # fmt: skip
