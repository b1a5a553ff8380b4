"""Triton kernel of attention in `model.decode`: one new token a row against the cache, in chunks of slots.

Always holds what `model.triton_decode` says: float32 sums in a fixed order; before `gdc_wait` nothing of this step is read.

Shapes: B rows, N heads, H head size, S slots of the cache.
"""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def chunk_of(B: int) -> int:
    """Slots of one program of attention: small ones where few rows would leave multiprocessors without work."""
    return 64 if B <= 4 else 128


@triton.jit
def _turned(
    base, scale, cosine, sine, eps, H: tl.constexpr, BLOCK_H: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr
):
    """One head's query or key, normed and turned: float32 [BLOCK_H]."""
    h = tl.arange(0, BLOCK_H)
    there = h < H
    # Feature i turns with feature i + H/2; the half-split layout of `model.rope`.
    left = h < H // 2
    other = tl.where(left, h + H // 2, h - H // 2)
    x = tl.load(base + h, mask=there, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x, 0) / H
        centred = tl.where(there, x - mean, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / H + eps)
        x = centred * rstd * tl.load(scale + h, mask=there, other=0.0).to(tl.float32)
    if ROPE:
        y = tl.load(base + other, mask=there, other=0.0).to(tl.float32)
        if NORM:
            y = tl.where(there, y - mean, 0.0) * rstd * tl.load(scale + other, mask=there, other=0.0).to(tl.float32)
        pair = tl.where(left, h, other)
        cos = tl.load(cosine + pair, mask=there, other=0.0)
        sin = tl.load(sine + pair, mask=there, other=0.0)
        x = x * cos + tl.where(left, -y, y) * sin
    return x


@triton.jit
def _attend_kernel(
    qkv, keys, values, cosines, sines, lengths, query_scale, key_scale, parts, peaks, sums, counters, out, softmax_scale,
    eps, N, S, H: tl.constexpr, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, JOINED: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row, one chunk of slots; the last of its programs to finish joins what all found."""
    head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    # Lengths and earlier slots were written before this step began.
    place = tl.load(lengths + row)
    last = place // CHUNK
    if split <= last:
        h = tl.arange(0, BLOCK_H)
        slot = split * CHUNK + tl.arange(0, CHUNK)
        there = (slot < place)[:, None] & (h < H)[None, :]
        at = ((row * S + slot) * N + head)[:, None] * H + h[None, :]
        k = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        if PDL:
            gdc_wait()
        base = qkv + row * 3 * N * H + head * H
        cosine, sine = cosines + place * (H // 2), sines + place * (H // 2)
        # As the cache would hold them: rounded.
        kind = keys.dtype.element_ty
        q = (
            _turned(base, query_scale, cosine, sine, eps, H, BLOCK_H, ROPE, NORM).to(kind).to(tl.float32)
            * softmax_scale
        )
        new_k = _turned(base + N * H, key_scale, cosine, sine, eps, H, BLOCK_H, ROPE, NORM).to(kind)
        new_v = tl.load(base + 2 * N * H + h, mask=h < H, other=0.0)
        if split == last:
            new = ((row * S + place) * N + head) * H + h
            tl.store(keys + new, new_k, mask=(h < H) & (place < S))
            tl.store(values + new, new_v, mask=(h < H) & (place < S))
        logits = tl.where(slot < place, tl.sum(k * q[None, :], 1), float("-inf"))
        # The new token is seen by the program of its chunk alone.
        new_logit = tl.where(split == last, tl.sum(new_k.to(tl.float32) * q, 0), float("-inf"))
        peak = tl.maximum(tl.max(logits, 0), new_logit)
        weights = tl.exp(logits - peak)
        new_weight = tl.exp(new_logit - peak)
        total = tl.sum(weights, 0) + new_weight
        mixed = tl.sum(v * weights[:, None], 0) + new_v.to(tl.float32) * new_weight
        to = out + (row * N + head) * H + h
        if last == 0:
            tl.store(to, (mixed / total).to(out.dtype.element_ty), mask=h < H)
        else:
            group = row * N + head
            tl.store(parts + (group * SPLITS + split) * H + h, mixed, mask=h < H)
            tl.store(peaks + group * SPLITS + split, peak)
            tl.store(sums + group * SPLITS + split, total)
            # Every thread has stored before one of them counts.
            tl.debug_barrier()
            arrived = tl.atomic_add(counters + group, 1, sem="acq_rel")
            if arrived == last:
                index = tl.arange(0, BLOCK_SPLITS)
                used = index <= last
                # Past the first-level cache, which may hold what stood there before.
                all_peaks = tl.load(
                    peaks + group * SPLITS + index, mask=used, other=float("-inf"), cache_modifier=".cg"
                )
                all_sums = tl.load(sums + group * SPLITS + index, mask=used, other=0.0, cache_modifier=".cg")
                top = tl.max(all_peaks, 0)
                whole = tl.sum(all_sums * tl.exp(all_peaks - top), 0)
                mixed = tl.zeros((BLOCK_H,), tl.float32)
                for first in range(0, SPLITS, JOINED):
                    some = first + tl.arange(0, JOINED)
                    peak_of = tl.load(
                        peaks + group * SPLITS + some, mask=some <= last, other=float("-inf"), cache_modifier=".cg"
                    )
                    part = tl.load(
                        parts + (group * SPLITS + some)[:, None] * H + h[None, :],
                        mask=(some <= last)[:, None] & (h < H)[None, :], other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    mixed += tl.sum(part * tl.exp(peak_of - top)[:, None], 0)
                tl.store(to, (mixed / whole).to(out.dtype.element_ty), mask=h < H)
                tl.store(counters + group, 0)


class Scratch(NamedTuple):
    """What attention's programs leave for the last of them; one for all layers."""

    parts: Tensor
    """float32 [B, N, splits, H]."""
    peaks: Tensor
    """float32 [B, N, splits]."""
    sums: Tensor
    """float32 [B, N, splits]."""
    counters: Tensor
    """int32 [B, N], zero between two kernels."""
    chunk: int
    """Slots of one program."""


def make_scratch(rows: int, heads: int, head_size: int, slots: int, chunk: int, device: torch.device) -> Scratch:
    """Scratch for caches of so many slots."""
    splits = triton.cdiv(slots, chunk)
    return Scratch(
        torch.empty(rows, heads, splits, head_size, device=device, dtype=torch.float32),
        torch.empty(rows, heads, splits, device=device, dtype=torch.float32),
        torch.empty(rows, heads, splits, device=device, dtype=torch.float32),
        torch.zeros(rows, heads, device=device, dtype=torch.int32),
        chunk,
    )


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, rotation: tuple[Tensor, Tensor] | None,
    scales: tuple[Tensor, Tensor] | None, eps: float, out: Tensor, scratch: Scratch, *, pdl: bool = False,
    num_warps: int = 4,
) -> None:  # fmt: skip
    """Turn the new queries and keys, write keys and values into the cache at `lengths`, and attend to all slots up to there.

    Args:
        qkv: [B, 3, N, H].
        keys, values: [B, S, N, H], one layer of the cache.
        lengths: int64 [B].
        rotation: cosines and sines [S, H/2] of every position, float32.
        scales: [H] each, of the norms of queries and keys.
        out: [B, N, H].
    """
    B, S, N, H = keys.shape
    cosines, sines = rotation or (qkv, qkv)
    query_scale, key_scale = scales or (qkv, qkv)
    splits = triton.cdiv(S, scratch.chunk)
    _attend_kernel[(N, B, splits)](
        qkv, keys, values, cosines, sines, lengths, query_scale, key_scale, scratch.parts, scratch.peaks, scratch.sums,
        scratch.counters, out, H**-0.5, eps, N, S, H=H, BLOCK_H=triton.next_power_of_2(H), CHUNK=scratch.chunk,
        SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits), JOINED=16, ROPE=rotation is not None,
        NORM=scales is not None, PDL=pdl, num_warps=num_warps, launch_pdl=pdl,
    )  # fmt: skip
