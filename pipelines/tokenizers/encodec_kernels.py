"""The arithmetic of EnCodec's encoder as Triton kernels: residual units, strided convolutions, LSTM steps, quantizer.

Layout: activations are channels-last, [rows, C], C a power of two. What a convolution reads is already through its ELU, in
float16 planes: plane 0 the value, and with `SPLIT` plane 1 what rounding took from it. Weights are [K, N] in the same two
planes. With `SPLIT` a product is high * high + low * high + high * low, which is as exact as float32 needs and still runs on
the float16 tensor cores; without, it is high * high alone. Sums are float32 always.

Always holds: a row's result depends on that row's inputs alone, bit by bit, whatever lies beside it in the batch, because
every sum runs in one fixed order. Left padding happens in the addresses: position -p is p ("reflect") or zero ("constant").
"""

# ruff: noqa: N803
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

# BM rows, BN columns and BK terms of a tile; C input channels, N output channels, H inner channels.


@triton.jit
def _elu(x):
    # exp(x) - 1 is never below x, so the maximum chooses the branch; and NaN stays NaN, for `quantize` to find.
    negative = tl.exp2(tl.minimum(x * 1.4426950408889634, 0.0)) - 1.0
    return tl.maximum(x, negative, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _weight(pointers, plane: tl.constexpr, SPLIT: tl.constexpr):
    """A tile of weights, both planes; without `SPLIT` the second is not used, and not read."""
    high = tl.load(pointers)
    return high, tl.load(pointers + plane) if SPLIT else high


@triton.jit
def _add_product(high, low, weight, total, SPLIT: tl.constexpr):
    """total + (high + low) @ weight, for a weight as `_weight` reads it.

    Tensor cores cut off what they add, always towards zero: over thousands of terms that is 100 times float32's error. So
    with `SPLIT` a block's sum begins at zero, and joins the total in float32.
    """
    if SPLIT:
        part = tl.dot(high, weight[1], tl.dot(low, weight[0]))
        return total + tl.dot(high, weight[0], part)
    return tl.dot(high, weight[0], total)


@triton.jit
def _product(a, weight, total, SPLIT: tl.constexpr):
    """total + a @ weight, for `a` in float32."""
    high = a.to(tl.float16)
    return _add_product(high, (a - high.to(tl.float32)).to(tl.float16), weight, total, SPLIT)


@triton.jit
def _store_planes(values, pointers, plane, mask, SPLIT: tl.constexpr):
    high = values.to(tl.float16)
    tl.store(pointers, high, mask=mask)
    if SPLIT:
        tl.store(pointers + plane, (values - high.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def _before(time, back: tl.constexpr, inside, REFLECT: tl.constexpr):
    """Where the input of `back` steps before each time lies, and whether it is there at all."""
    at = time - back
    if REFLECT:
        return tl.abs(at), inside
    return at, inside & (at >= 0)


@triton.jit
def _first_convolution(waveform, weight, bias, at, inside, C: tl.constexpr, TAPS: tl.constexpr, REFLECT: tl.constexpr):
    """The first convolution at positions `at` [BM] -> float32 [BM, C]. It has 16 taps, the first of them zeros."""
    taps = tl.arange(0, 16)
    source = at[:, None] - 15 + taps[None, :]
    there = inside[:, None] & (taps >= 16 - TAPS)[None, :]
    if REFLECT:
        source = tl.abs(source)
    else:
        there &= source >= 0
    samples = tl.load(waveform + source, mask=there, other=0.0)
    x = _product(samples, weight, tl.zeros((at.shape[0], C), tl.float32), True) + bias[None, :]
    return x if REFLECT else tl.where(inside[:, None], x, 0.0)


@triton.jit(do_not_specialize=["T"])
def first_unit(
    waveform, first_weight, first_bias, weight, bias, out_weight, skip_weight, out_bias, out, out_plane,
    T,
    C: tl.constexpr, H: tl.constexpr, FIRST_TAPS: tl.constexpr,
    REFLECT: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The first convolution and the residual unit after it: waveform float32 [B, T] -> ELU of the unit's output, planes."""
    programs = tl.cdiv(T, BM * TILES)
    row = (tl.program_id(0) // programs).to(tl.int64)
    start = (tl.program_id(0) % programs) * (BM * TILES)
    waveform += row * T
    out += row * T * C
    channels, inner, sixteen = tl.arange(0, C), tl.arange(0, H), tl.arange(0, 16)
    first = _weight(first_weight + sixteen[:, None] * C + channels[None, :], 16 * C, True)
    places = weight + channels[:, None] * H + inner[None, :]
    oldest = _weight(places, 3 * C * H, SPLIT)
    older = _weight(places + C * H, 3 * C * H, SPLIT)
    present = _weight(places + 2 * C * H, 3 * C * H, SPLIT)
    outer = _weight(out_weight + inner[:, None] * C + channels[None, :], H * C, SPLIT)
    skip = _weight(skip_weight + channels[:, None] * C + channels[None, :], C * C, SPLIT)
    first_bias = tl.load(first_bias + channels)
    bias, out_bias = tl.load(bias + inner), tl.load(out_bias + channels)
    for tile in range(TILES):
        time = start + tile * BM + tl.arange(0, BM)
        inside = time < T
        hidden = tl.zeros((BM, H), tl.float32) + bias[None, :]
        at, there = _before(time, 2, inside, REFLECT)
        x = _first_convolution(waveform, first, first_bias, at, there, C, FIRST_TAPS, REFLECT)
        hidden = _product(_elu(x), oldest, hidden, SPLIT)
        at, there = _before(time, 1, inside, REFLECT)
        x = _first_convolution(waveform, first, first_bias, at, there, C, FIRST_TAPS, REFLECT)
        hidden = _product(_elu(x), older, hidden, SPLIT)
        x = _first_convolution(waveform, first, first_bias, time, inside, C, FIRST_TAPS, REFLECT)
        hidden = _product(_elu(x), present, hidden, SPLIT)
        result = tl.zeros((BM, C), tl.float32) + out_bias[None, :]
        result = _product(x, skip, _product(_elu(hidden), outer, result, SPLIT), SPLIT)
        _store_planes(_elu(result), out + time[:, None] * C + channels[None, :], out_plane, inside[:, None], SPLIT)


@triton.jit(do_not_specialize=["T"])
def narrow_unit(
    x, weight, bias, out_weight, skip_weight, out_bias, out, out_plane,
    T,
    C: tl.constexpr, H: tl.constexpr, REFLECT: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A residual unit of few channels, all its weights at hand: x [B, T, C] -> ELU of skip(x) + convolutions(x), planes."""
    programs = tl.cdiv(T, BM * TILES)
    row = (tl.program_id(0) // programs).to(tl.int64)
    start = (tl.program_id(0) % programs) * (BM * TILES)
    x += row * T * C
    out += row * T * C
    channels, inner = tl.arange(0, C), tl.arange(0, H)
    places = weight + channels[:, None] * H + inner[None, :]
    oldest = _weight(places, 3 * C * H, SPLIT)
    older = _weight(places + C * H, 3 * C * H, SPLIT)
    present = _weight(places + 2 * C * H, 3 * C * H, SPLIT)
    outer = _weight(out_weight + inner[:, None] * C + channels[None, :], H * C, SPLIT)
    skip = _weight(skip_weight + channels[:, None] * C + channels[None, :], C * C, SPLIT)
    bias, out_bias = tl.load(bias + inner), tl.load(out_bias + channels)
    for tile in range(TILES):
        time = start + tile * BM + tl.arange(0, BM)
        inside = time < T
        hidden = tl.zeros((BM, H), tl.float32) + bias[None, :]
        at, there = _before(time, 2, inside, REFLECT)
        part = tl.load(x + at[:, None] * C + channels[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        hidden = _product(_elu(part), oldest, hidden, SPLIT)
        at, there = _before(time, 1, inside, REFLECT)
        part = tl.load(x + at[:, None] * C + channels[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        hidden = _product(_elu(part), older, hidden, SPLIT)
        part = tl.load(x + time[:, None] * C + channels[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        hidden = _product(_elu(part), present, hidden, SPLIT)
        result = tl.zeros((BM, C), tl.float32) + out_bias[None, :]
        result = _product(part, skip, _product(_elu(hidden), outer, result, SPLIT), SPLIT)
        _store_planes(_elu(result), out + time[:, None] * C + channels[None, :], out_plane, inside[:, None], SPLIT)


@triton.jit(do_not_specialize=["T"])
def wide_unit(
    x, weight, bias, out_weight, skip_weight, out_bias, out, out_plane,
    T,
    C: tl.constexpr, H: tl.constexpr, REFLECT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A residual unit of many channels, in blocks of them: x [B, T, C] -> ELU of skip(x) + convolutions(x), planes."""
    tiles = tl.cdiv(T, BM)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    time = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    inside = time < T
    x += row * T * C
    out += row * T * C
    terms, inner, columns = tl.arange(0, BK), tl.arange(0, H), tl.arange(0, BN)
    hidden = tl.zeros((BM, H), tl.float32)
    for block in range(3 * C // BK):
        back, first = 2 - block * BK // C, tl.multiple_of(block * BK % C, BK)
        at = time - back
        there = inside & (at >= 0)
        if REFLECT:
            at = tl.abs(at)
            there = inside
        part = tl.load(x + at[:, None] * C + first + terms[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        kernel = _weight(weight + (block * BK + terms)[:, None] * H + inner[None, :], 3 * C * H, SPLIT)
        hidden = _product(_elu(part), kernel, hidden, SPLIT)
    hidden = _elu(hidden + tl.load(bias + inner)[None, :])
    for start in tl.static_range(0, C, BN):
        outer = _weight(out_weight + inner[:, None] * C + start + columns[None, :], H * C, SPLIT)
        result = tl.zeros((BM, BN), tl.float32) + tl.load(out_bias + start + columns)[None, :]
        result = _product(hidden, outer, result, SPLIT)
        for first in range(0, C, BK):
            part = tl.load(x + time[:, None] * C + first + terms[None, :], mask=inside[:, None], other=0.0)
            skip = _weight(skip_weight + (first + terms)[:, None] * C + start + columns[None, :], C * C, SPLIT)
            result = _product(part.to(tl.float32), skip, result, SPLIT)
        places = out + time[:, None] * C + start + columns[None, :]
        _store_planes(_elu(result), places, out_plane, inside[:, None], SPLIT)


@triton.jit(do_not_specialize=["M", "T"])
def convolution(
    x, x_plane, x_row, x_time, weight, bias, out, out_plane, out_row, out_time,
    M, T,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, REFLECT: tl.constexpr,
    SPLIT: tl.constexpr, PLANES: tl.constexpr, ACTIVATE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Causal convolution of planes x; M = B * T output rows of N channels, as planes (`PLANES`) or in out's own type.

    `x_row`, `x_time`: elements from clip to clip and from step to step, so that time may be the slower or the faster of them.
    """
    columns = (tl.program_id(0) % (N // BN)) * BN + tl.arange(0, BN)
    rows = tl.program_id(0) // (N // BN) * BM + tl.arange(0, BM)
    inside = rows < M
    clip, time = (rows // T).to(tl.int64), rows % T
    terms = tl.arange(0, BK)
    source = x + clip * x_row
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(TAPS * C // BK):
        tap, first = block * BK // C, tl.multiple_of(block * BK % C, BK)
        at = time * STRIDE - (TAPS - STRIDE) + tap
        there = inside & (at >= 0)
        if REFLECT:
            at = tl.abs(at)
            there = inside
        places = source[:, None] + at.to(tl.int64)[:, None] * x_time + first + terms[None, :]
        high = tl.load(places, mask=there[:, None], other=0.0)
        low = tl.load(places + x_plane, mask=there[:, None], other=0.0) if SPLIT else high
        kernel = _weight(weight + (block * BK + terms)[:, None] * N + columns[None, :], TAPS * C * N, SPLIT)
        total = _add_product(high, low, kernel, total, SPLIT)
    total += tl.load(bias + columns)[None, :]
    if ACTIVATE:
        total = _elu(total)
    places = out + (clip * out_row + time.to(tl.int64) * out_time)[:, None] + columns[None, :]
    if PLANES:
        _store_planes(total, places, out_plane, inside[:, None], SPLIT)
    else:
        tl.store(places, total.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["offset", "B"])
def lstm_step(
    gates, hidden, cell, weight, skip, out, clock,
    offset, B,
    D: tl.constexpr, SPLIT: tl.constexpr, LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Time step `clock` + `offset` of one LSTM layer for B clips.

    gates: float32 [steps, B, D, 4], read at `offset`: the input's share with both biases. The last dimension, here and in
    the columns of `weight`, is the gate: input, forget, cell, output.
    hidden: float16 [T + 1, planes, B, D]; step t reads slot t and writes slot t + 1. cell: float32 [B, D].
    out: with `LAST`, [T, planes, B, D] of ELU(skip + hidden), which is what follows the LSTM.
    """
    slot = B * D * (2 if SPLIT else 1)
    now = (tl.load(clock) + offset).to(tl.int64) * slot
    first_column = (tl.program_id(0) % (D // BN)) * BN
    rows = (tl.program_id(0) // (D // BN)) * BM + tl.arange(0, BM)
    inside = (rows < B)[:, None]
    terms, columns = tl.arange(0, BK), tl.arange(0, 4 * BN)
    before = hidden + now
    places = gates + offset.to(tl.int64) * B * 4 * D + rows[:, None] * (4 * D) + first_column * 4 + columns[None, :]
    total = tl.load(places, mask=inside, other=0.0)
    for first in range(0, D, BK):
        pointers = before + rows[:, None] * D + first + terms[None, :]
        high = tl.load(pointers, mask=inside, other=0.0)
        low = tl.load(pointers + B * D, mask=inside, other=0.0) if SPLIT else high
        kernel = weight + (first + terms)[:, None] * (4 * D) + first_column * 4 + columns[None, :]
        total = _add_product(high, low, _weight(kernel, D * 4 * D, SPLIT), total, SPLIT)
    even, odd = tl.split(tl.reshape(total, (BM, BN, 2, 2)))
    enter, fresh = tl.split(even)
    forget, leave = tl.split(odd)
    places = rows[:, None] * D + first_column + tl.arange(0, BN)[None, :]
    state = tl.load(cell + places, mask=inside, other=0.0)
    state = _sigmoid(forget) * state + _sigmoid(enter) * _tanh(fresh)
    tl.store(cell + places, state, mask=inside)
    value = _sigmoid(leave) * _tanh(state)
    _store_planes(value, before + slot + places, B * D, inside, SPLIT)
    if LAST:
        places = now + places
        given = tl.load(skip + places, mask=inside, other=0.0).to(tl.float32)
        if SPLIT:
            given += tl.load(skip + B * D + places, mask=inside, other=0.0).to(tl.float32)
        _store_planes(_elu(given + value), out + places, B * D, inside, SPLIT)


@triton.jit(do_not_specialize=["M"])
def quantize(
    latents, centres, scales, entries, entry_plane, half_norms, exact, codes,
    M,
    K: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Residual quantization: latents float32 [M, D] -> codes int32 [M, K]; -1 where a latent is not finite.

    Codebook q is searched as planes `entries` [2, K, ENTRIES, D] after (x - `centres`[q]) * `scales`[q]: distances between
    near entries would drown in the square of a common mean, and float16 holds values near 1 best. `half_norms` are those
    entries' squared norms, halved. What is left for the next codebook comes from `exact`, centred only, float32.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < M
    rows = rows.to(tl.int64)
    dimensions, ahead = tl.arange(0, D), tl.arange(0, BN)
    residual = tl.load(latents + rows[:, None] * D + dimensions[None, :], mask=inside[:, None], other=0.0)
    finite = tl.max(tl.where(tl.abs(residual) < 1e30, 0, 1), axis=1) == 0
    for q in range(K):
        residual -= tl.load(centres + q * D + dimensions)[None, :]
        # A latent thousands of times larger than every entry still has a nearest one.
        scaled = tl.minimum(tl.maximum(residual * tl.load(scales + q), -60000.0), 60000.0)
        high = scaled.to(tl.float16)
        low = (scaled - high.to(tl.float32)).to(tl.float16)
        smallest = tl.full((BM,), float("inf"), tl.float32)
        nearest = tl.zeros((BM,), tl.int32)
        for first in range(0, ENTRIES, BN):
            index = q * ENTRIES + first + ahead
            pointers = entries + index[None, :] * D + dimensions[:, None]
            entry = tl.load(pointers)
            product = tl.dot(low, entry)
            product = tl.dot(high, tl.load(pointers + entry_plane), product)
            score = tl.load(half_norms + index)[None, :] - tl.dot(high, entry, product)
            least, place = tl.min(score, axis=1, return_indices=True)
            nearest = tl.where(least < smallest, first + place, nearest)
            smallest = tl.minimum(least, smallest)
        tl.store(codes + rows * K + q, tl.where(finite, nearest, -1), mask=inside)
        residual -= tl.load(exact + (q * ENTRIES + nearest)[:, None] * D + dimensions[None, :])
