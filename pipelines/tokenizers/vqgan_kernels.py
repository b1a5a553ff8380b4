"""GPU kernels of the VQGAN encoder: convolution, group normalization, first layer, nearest code.

What enters and leaves: activations [N, H, W, C], channels last, float16 or bfloat16. What always holds: sums are kept
in float32, and every sum is made in a fixed order, so the same input gives the same output bit for bit. On a GPU
the time of an encoder goes to the convolutions' products and, next, to reading and writing activations for what
lies between them. So a convolution adds its bias and the residual before it writes, and leaves the sums from which
the next normalization makes its statistics: no pass over memory is spent on either.

Needs Triton, which comes with torch's CUDA builds. TRITON_INTERPRET=1 runs the kernels on the CPU, for tests.
"""

# A kernel's arguments have no Python types, and its constants are written large, as the field does.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: N803

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Shapes: N pictures, H W height and width, C channels, G groups, M latent vectors, E embedding channels, V codes.

TILE = 128
"""Output pixels and output channels of one program of the convolution, vectors and codes of one of the search."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What a convolution wrote, and the sums over its tiles that a normalization needs."""

    values: Tensor
    """[N, H, W, C]"""
    sums: Tensor
    """float32 [N, tiles, 2, C]: for each tile and channel the sum and the sum of squares."""


@triton.jit
def _conv_kernel(
    x, weight, y, residual, bias, sums, tiles_down, tiles_across, blocks, channels_out,
    CHANNELS: tl.constexpr, TAPS_DOWN: tl.constexpr, TAPS_ACROSS: tl.constexpr, STRIDE: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PIXELS output pixels of one row and BLOCK channels, as a product over taps and input channels.

    The copy engine fills with zeros what lies outside the picture, which is the padding. The product is [BLOCK, PIXELS]:
    a thread then holds many pixels of few channels, and most of each sum over pixels is made within it.
    """
    STEPS: tl.constexpr = CHANNELS // STEP
    # The blocks of channels of one tile run next to each other and find its input in the cache.
    block = tl.program_id(0) % blocks
    tile = tl.program_id(0) // blocks
    across = tile % tiles_across * PIXELS
    down = tile // tiles_across % tiles_down
    picture = tile // (tiles_across * tiles_down)
    total = tl.zeros((BLOCK, PIXELS), tl.float32)
    for step in tl.range(0, TAPS_DOWN * TAPS_ACROSS * STEPS, num_stages=STAGES):
        tap_down = step // (TAPS_ACROSS * STEPS)
        tap_across = step // STEPS % TAPS_ACROSS
        channel = step % STEPS * STEP
        if STRIDE == 1:
            at_row, at_column = down + tap_down - TAPS_DOWN // 2, across + tap_across - TAPS_ACROSS // 2
            a = x.load([picture, at_row, at_column, channel])
        else:
            # Rows and columns in pairs: [N, H / 2, 2, W / 2, 2 C].
            at_row, at_column = down + tap_down // 2, across + tap_across // 2
            a = x.load([picture, at_row, tap_down % 2, at_column, tap_across % 2 * CHANNELS + channel])
        b = weight.load([block * BLOCK, step * STEP])
        # This reshape drops axes of length 1 and nothing else. With one that joins axes, for tiles of several rows,
        # operands go through registers, and Triton 3.6 gave wrong results in some places (docs/decisions/0007).
        total = tl.dot(b, a.reshape(PIXELS, STEP).T, total)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels_out
    total += tl.load(bias + channel, mask=there, other=0.0)[:, None]
    if ADD:
        total += residual.load([picture, down, across, block * BLOCK]).reshape(PIXELS, BLOCK).T.to(tl.float32)
    here = sums + tile.to(tl.int64) * 2 * channels_out + channel
    tl.store(here, tl.sum(total, 1), mask=there)
    tl.store(here + channels_out, tl.sum(total * total, 1), mask=there)
    y.store([picture, down, across, block * BLOCK], total.T.to(y.dtype).reshape(1, 1, PIXELS, BLOCK))


def fits_conv(width: int, channels: int) -> bool:
    """Whether `conv` takes rows of so many output pixels and so many input channels."""
    return width % TILE == 0 and channels % 32 == 0


def conv(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int = 1, residual: Tensor | None = None) -> Activation:
    """Convolve with side 3, add bias and residual, and sum for the next normalization.

    Args:
        x: [N, H, W, C], contiguous, that `fits_conv`.
        weight: [C_out, 3, 3, C], of x's dtype. At stride 1 zeros around the picture keep H and W; at stride 2 there is one
            row of them below and one column on the right, and H and W are even.
        bias: float32 [C_out].
        residual: Like the result, and added to it.
    """
    n, h, w, c = x.shape
    if weight.shape[1:] != (3, 3, c) or stride not in (1, 2) or h % stride or not fits_conv(w // stride, c):
        raise ValueError(f"no kernel for pictures {list(x.shape)}, weights {list(weight.shape)}, stride {stride}.")
    y = torch.empty((n, h // stride, w // stride, weight.shape[0]), dtype=x.dtype, device=x.device)
    if stride == 2:
        x = x.view(n, h // 2, 2, w // 2, 2 * c)
    return _convolve(x, weight, bias, y, residual)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, residual: Tensor | None) -> Activation:
    """Run the kernel: x [N, rows, columns, C], or with rows and columns in pairs, to y [N, rows, columns, C_out]."""
    n, rows, columns, channels_out = y.shape
    taps_down, taps_across, channels = weight.shape[1:]
    block = min(TILE, triton.next_power_of_2(channels_out))
    step = 64 if channels % 64 == 0 else 32
    target = _descriptor(y, [1, 1, TILE, block])
    sums = torch.empty((n, rows * columns // TILE, 2, channels_out), dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(channels_out, block)
    # Two or three programs share a multiprocessor, and the products of one cover the start and the end of another.
    # More steps under way at once leave room for fewer programs; the residual's copies need the room.
    _conv_kernel[(n * rows * columns // TILE * blocks,)](
        _descriptor(x, [1, 1, TILE, step] if x.ndim == 4 else [1, 1, 1, TILE, step]),
        _descriptor(weight.flatten(1), [block, step]),
        target, target if residual is None else _descriptor(residual, target.block_shape), bias, sums,
        rows, columns // TILE, blocks, channels_out,
        CHANNELS=channels, TAPS_DOWN=taps_down, TAPS_ACROSS=taps_across, STRIDE=x.ndim - 3,
        PIXELS=TILE, BLOCK=block, STEP=step, ADD=residual is not None, STAGES=2 if residual is None else 3, num_warps=4,
    )  # fmt: skip
    return Activation(y, sums)


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


@triton.jit
def _finish_kernel(
    x, bias, residual, y, sums, pixels, tiles, channels,
    ADD: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = channel < channels
    where = (picture * pixels + pixel)[:, None] * channels + channel[None, :]
    mask = (pixel < pixels)[:, None] & there[None, :]
    total = tl.load(x + where, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + channel, mask=there)[None, :]
    if ADD:
        total += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + where, total.to(y.dtype.element_ty), mask=mask)
    total = tl.where(mask, total, 0.0)
    here = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(here, tl.sum(total, 0), mask=there)
    tl.store(here + channels, tl.sum(total * total, 0), mask=there)


def finish(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Activation:
    """What `conv` does after its products, for products [N, H, W, C] that a library made.

    Args:
        bias: float32 [C].
        residual: Like x, of any dtype.

    Returns:
        float32 values: where a library convolves pictures are small, and rounding less costs nearly nothing.
    """
    n, h, w, c = x.shape
    width = min(TILE, triton.next_power_of_2(c))
    block = 4096 // width
    tiles = triton.cdiv(h * w, block)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    sums = torch.empty((n, tiles, 2, c), dtype=torch.float32, device=x.device)
    _finish_kernel[(n * tiles, triton.cdiv(c, width))](
        x, bias, x if residual is None else residual, y, sums, h * w, tiles, c,
        ADD=residual is not None, PIXELS=block, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return Activation(y, sums)


@triton.jit
def _spread_kernel(pixels, y, total, width, BLOCK: tl.constexpr):
    """[.., W, 3] to [.., W + 3, 8]: a column of zeros, the pixels with each value twice, two columns of zeros."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = place % (width + 3) - 1
    channel = tl.arange(0, 8)
    inside = (place < total) & (column >= 0) & (column < width)
    source = (place // (width + 3) * width + column).to(tl.int64) * 3
    mask = inside[:, None] & (channel < 6)[None, :]
    given = tl.load(pixels + source[:, None] + (channel % 3)[None, :], mask=mask, other=0).to(tl.int32)
    # Odd numbers up to 255, which even bfloat16 holds exactly, over a power of two.
    values = tl.where(mask, (2 * given - 255).to(tl.float32) / 256, 0.0)
    where = place.to(tl.int64)[:, None] * 8 + channel[None, :]
    tl.store(y + where, values.to(y.dtype.element_ty), mask=(place < total)[:, None])


def stem_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[C_out, 3, 3, 3] in float32, input channels second, to what `stem` takes: [C_out, 3, 1, 32].

    For each of three rows four pixels of eight channels: of the first three pixels six channels count, the weights'
    coarse part and what it leaves.
    """
    rows = weight.permute(0, 2, 3, 1) * (256 / 255)
    coarse = rows.to(dtype)
    both = torch.cat([coarse, (rows - coarse.float()).to(dtype)], -1)
    return F.pad(both, (0, 2, 0, 1)).flatten(2)[:, :, None].contiguous()


def stem(pixels: Tensor, weight: Tensor, bias: Tensor) -> Activation:
    """The first convolution, 3 x 3 on pixels: uint8 [N, H, W, 3], taken as 2 x / 255 - 1, to [N, H, W, C_out].

    Args:
        weight: From `stem_weight`; its dtype is that of the result. In two parts it is as good as float32.
        bias: float32 [C_out].
    """
    n, h, w, _ = pixels.shape
    wide = torch.empty((n, h, w + 3, 8), dtype=weight.dtype, device=pixels.device)
    _spread_kernel[(triton.cdiv(n * h * (w + 3), 512),)](pixels, wide, n * h * (w + 3), w, BLOCK=512, num_warps=4)
    if fits_conv(w, 32):
        # Four pixels from each on, which overlap: three neighbours, and one whose weights are zero.
        windows = wide.as_strided((n, h, w, 32), (*wide.stride()[:2], 8, 1))
        # The kernel centres its taps across; here they are in the window, which starts on the left.
        y = torch.empty((n, h, w, weight.shape[0]), dtype=weight.dtype, device=pixels.device)
        return _convolve(windows, weight, bias, y, None)
    square = weight.view(-1, 3, 4, 8)[:, :, :3]
    product = F.conv2d(wide.permute(0, 3, 1, 2), square.permute(0, 3, 1, 2), padding=(1, 0))[..., :w]
    return finish(product.permute(0, 2, 3, 1).contiguous(), bias)


@triton.jit
def _affine_kernel(
    sums, weight, bias, affine, groups, channels, pixels, eps,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Statistics of one group of one picture, and what they make of its channels: a factor and a summand."""
    picture = tl.program_id(0) // groups
    within = tl.arange(0, WIDTH)
    channel = tl.program_id(0) % groups * GROUP + within
    here = sums + picture.to(tl.int64) * TILES * 2 * channels + channel
    first = tl.zeros((CHUNK, WIDTH), tl.float32)
    second = tl.zeros((CHUNK, WIDTH), tl.float32)
    for start in range(0, TILES, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        mask = (tile < TILES)[:, None] & (within < GROUP)[None, :]
        first += tl.load(here[None, :] + tile[:, None] * 2 * channels, mask=mask, other=0.0)
        second += tl.load(here[None, :] + (tile * 2 + 1)[:, None] * channels, mask=mask, other=0.0)
    count = pixels * GROUP
    mean = tl.sum(tl.sum(first, 0), 0) / count
    variance = tl.sum(tl.sum(second, 0), 0) / count - mean * mean
    factor = tl.rsqrt(tl.maximum(variance, 0.0) + eps) * tl.load(weight + channel, mask=within < GROUP)
    summand = tl.load(bias + channel, mask=within < GROUP) - mean * factor
    there = affine + picture * 2 * channels + channel
    tl.store(there, factor, mask=within < GROUP)
    tl.store(there + channels, summand, mask=within < GROUP)


@triton.jit
def _normalize_kernel(
    x, affine, y, pixels, blocks, channels,
    SILU: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = channel < channels
    factor = tl.load(affine + picture * 2 * channels + channel, mask=there)
    summand = tl.load(affine + (picture * 2 + 1) * channels + channel, mask=there)
    where = (picture.to(tl.int64) * pixels + pixel)[:, None] * channels + channel[None, :]
    mask = (pixel < pixels)[:, None] & there[None, :]
    values = tl.load(x + where, mask=mask).to(tl.float32) * factor[None, :] + summand[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(y + where, values.to(y.dtype.element_ty), mask=mask)


def normalize(
    x: Activation, weight: Tensor, bias: Tensor, groups: int, *, silu: bool, dtype: torch.dtype, eps: float = 1e-6
) -> Tensor:
    """Group normalization from the sums that came with `x`, then x * sigmoid(x) if `silu`.

    Args:
        weight, bias: float32 [C].
        dtype: Of the result.
    """
    n, h, w, c = x.values.shape
    affine = torch.empty((n, 2, c), dtype=torch.float32, device=x.values.device)
    tiles = x.sums.shape[1]
    _affine_kernel[(n * groups,)](
        x.sums, weight, bias, affine, groups, c, h * w, eps,
        WIDTH=triton.next_power_of_2(c // groups), GROUP=c // groups, TILES=tiles,
        CHUNK=min(64, triton.next_power_of_2(tiles)), num_warps=1,
    )  # fmt: skip
    y = torch.empty(x.values.shape, dtype=dtype, device=x.values.device)
    width = min(TILE, triton.next_power_of_2(c))
    block = 8192 // width
    blocks = triton.cdiv(h * w, block)
    _normalize_kernel[(n * blocks, triton.cdiv(c, width))](
        x.values, affine, y, h * w, blocks, c, SILU=silu, PIXELS=block, WIDTH=width, num_warps=8
    )
    return y


@triton.jit
def _best_kernel(
    latents, codebook, offsets, factors, score, best, vectors, codes,
    CODES_EACH: tl.constexpr, STEPS: tl.constexpr, STEP: tl.constexpr, VECTORS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """The best of CODES_EACH codes for VECTORS latent vectors: coarse x coarse + coarse x fine + fine x coarse."""
    start = tl.program_id(0) * VECTORS
    row = start + tl.arange(0, VECTORS)
    factor = tl.load(factors + row, mask=row < vectors, other=1.0)
    best_score = tl.full((VECTORS,), float("-inf"), tl.float32)
    best_code = tl.zeros((VECTORS,), tl.int32)
    for offset in range(0, CODES_EACH, CODES):
        block = tl.program_id(1) * CODES_EACH + offset
        total = tl.zeros((VECTORS, CODES), tl.float32)
        for step in tl.range(0, 3 * STEPS, num_stages=3):
            # Parts in memory: coarse, then fine. Of the latents 0 0 1, of the codebook 0 1 0.
            part = step // STEPS
            within = step % STEPS * STEP
            a = latents.load([start, part // 2 * STEPS * STEP + within])
            b = codebook.load([block, part % 2 * STEPS * STEP + within])
            total = tl.dot(a, b.T, total)
        code = block + tl.arange(0, CODES)
        total = total * factor[:, None] + tl.load(offsets + code, mask=code < codes, other=float("-inf"))[None, :]
        score_here, code_here = tl.max(total, 1, return_indices=True)
        better = score_here > best_score
        best_score = tl.where(better, score_here, best_score)
        best_code = tl.where(better, block + code_here, best_code)
    where = tl.program_id(1) * vectors + row
    tl.store(score + where, best_score, mask=row < vectors)
    tl.store(best + where, best_code, mask=row < vectors)


@dataclass(frozen=True, slots=True)
class Codebook:
    """Entries laid out for `nearest`."""

    parts: Tensor
    """float16 [V, 2 E], coarse and fine, E padded to a multiple of 32."""
    offsets: Tensor
    """float32 [V]: what a code's score is before its product with the latent vector."""
    scale: float
    """A power of two; entry = (coarse + fine) * scale / 1024."""

    @classmethod
    def of(cls, entries: Tensor, offsets: Tensor) -> "Codebook":
        """Prepare entries [V, E] whose scores are entry x latent + offset.

        The nearest entry is the one of the largest product with offset - |entry|^2 / 2.
        """
        entries = entries.float()
        _, exponent = torch.frexp(entries.abs().max())
        scale = float(2.0 ** int(exponent))
        return cls(_in_two_parts(entries / scale), offsets.float().contiguous(), scale)


def _in_two_parts(values: Tensor) -> Tensor:
    """float32 [..., E] of magnitude up to 1 to float16 [..., 2 E], times 1024: together they are good to 2^-22."""
    values = F.pad(values, (0, -values.shape[-1] % 32)) * 1024.0
    coarse = values.half()
    return torch.cat([coarse, (values - coarse.float()).half()], -1)


def nearest(latents: Tensor, codebook: Codebook) -> Tensor:
    """The code of the best score for each latent vector, float32 [M, E], as int32 [M].

    Products are made from two float16 parts of each number, so they err no more than float32 ones do, and the scores,
    [M, V], never reach memory.
    """
    m = latents.shape[0]
    codes, doubled = codebook.parts.shape
    # Each vector by a power of two, to magnitude 1: exact, and undone in the score.
    _, exponent = torch.frexp(latents.abs().amax(1))
    rows = _in_two_parts(torch.ldexp(latents, -exponent[:, None]))
    factors = torch.ldexp(torch.full_like(latents[:, 0], codebook.scale * 2.0**-20), exponent)
    step = 64 if doubled % 128 == 0 else 32
    # Parts of the codebook side by side: or few vectors would keep few multiprocessors busy.
    splits = max(1, min(4, codes // 1024))
    score = torch.empty((splits, m), dtype=torch.float32, device=latents.device)
    best = torch.empty((splits, m), dtype=torch.int32, device=latents.device)
    _best_kernel[(triton.cdiv(m, TILE), splits)](
        _descriptor(rows, [TILE, step]), _descriptor(codebook.parts, [TILE, step]), codebook.offsets, factors,
        score, best, m, codes,
        CODES_EACH=triton.cdiv(codes, splits * TILE) * TILE, STEPS=doubled // 2 // step, STEP=step, VECTORS=TILE,
        CODES=TILE, num_warps=4,
    )  # fmt: skip
    return best.gather(0, score.argmax(0, keepdim=True))[0]
