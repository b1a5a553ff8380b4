"""The image encoder's GPU kernels against float64. With Triton installed, TRITON_INTERPRET=1 runs them on a CPU too."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from pipelines.tokenizers.vqgan_kernels import (  # noqa: E402
    Activation,
    Codebook,
    conv,
    finish,
    nearest,
    normalize,
    stem,
    stem_weight,
)

pytestmark = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3, torch.float32: 1e-6}
"""What rounding a result once to the dtype may cost, as a share of its norm."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _check_sums(found: Activation, expected: Tensor) -> None:
    first, second = found.sums.double().sum(1).unbind(1)
    scale = expected.square().sum((1, 2)).sqrt().max()
    assert ((first - expected.sum((1, 2))) / scale).abs().max() < 1e-4
    assert _error(second, expected.square().sum((1, 2))) < 1e-5


SIZES = [(2, 3, 128, 32, 64), (1, 2, 256, 64, 96)]
if DEVICE == "cuda":  # As large as they come, so that all multiprocessors are busy at once.
    SIZES += [(2, 256, 256, 128, 128), (4, 64, 128, 256, 512), (3, 7, 384, 96, 320)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_convolution_with_its_bias_and_residual_is_right_everywhere(
    dtype: torch.dtype, stride: int, add: bool, size: tuple[int, ...]
) -> None:
    n, h, w, c, channels_out = size
    x = _random(n, h * stride, w * stride, c).to(dtype)
    weight = (_random(channels_out, 3, 3, c, seed=1) / (9 * c) ** 0.5).to(dtype)
    bias, residual = _random(channels_out, seed=2), _random(n, h, w, channels_out, seed=3).to(dtype) if add else None
    found = conv(x, weight, bias, stride=stride, residual=residual)
    assert found.values.dtype == dtype
    for index in range(n):  # One by one: float64 takes room.
        image = x[index : index + 1].double().permute(0, 3, 1, 2)
        padded = F.pad(image, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        expected = F.conv2d(padded, weight.double().permute(0, 3, 1, 2), bias.double(), stride).permute(0, 2, 3, 1)
        if residual is not None:
            expected += residual[index].double()
        here = found.values[index : index + 1]
        assert _error(here, expected) < ROUNDING[dtype]
        # No place is far off, as one would be that a race had spoilt.
        assert (here.double() - expected).abs().max() < 20 * ROUNDING[dtype] * expected.abs().max()
        _check_sums(Activation(here, found.sums[index : index + 1]), expected)
    again = conv(x, weight, bias, stride=stride, residual=residual)
    assert torch.equal(found.values, again.values)
    assert torch.equal(found.sums, again.sums)


def test_a_convolution_that_no_kernel_can_do_is_refused() -> None:
    weight, bias = _random(32, 3, 3, 32).half(), _random(32)
    with pytest.raises(ValueError, match=r"no kernel for pictures \[1, 4, 96, 32\]"):
        conv(_random(1, 4, 96, 32).half(), weight, bias)
    with pytest.raises(ValueError, match=r"no kernel for pictures \[1, 5, 256, 32\].* stride 2"):
        conv(_random(1, 5, 256, 32).half(), weight, bias, stride=2)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size", [(2, 5, 7, 96), (3, 16, 16, 512), (1, 8, 8, 32)])
def test_products_of_a_library_are_finished_like_our_own(add: bool, size: tuple[int, ...]) -> None:
    x, bias, residual = _random(*size).half(), _random(size[3], seed=1), _random(*size, seed=2) if add else None
    found = finish(x, bias, residual)
    expected = x.double() + bias.double() + (residual.double() if residual is not None else 0)
    assert _error(found.values, expected) < ROUNDING[torch.float32]
    _check_sums(found, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(96, 4), (128, 32), (512, 32), (32, 32)])
def test_a_normalization_is_right_even_far_from_zero(
    dtype: torch.dtype, silu: bool, channels: int, groups: int
) -> None:
    x = (_random(2, 12, 20, channels) + 20 * _random(1, 1, 1, channels, seed=1)).to(dtype)
    weight, bias = _random(channels, seed=2), _random(channels, seed=3)
    summed = Activation(x, torch.stack([x.float().sum((1, 2)), x.float().square().sum((1, 2))], 1)[:, None])
    found = normalize(summed, weight, bias, groups, silu=silu, dtype=dtype)
    expected = F.group_norm(x.double().permute(0, 3, 1, 2), groups, weight.double(), bias.double(), 1e-6)
    expected = (F.silu(expected) if silu else expected).permute(0, 2, 3, 1)
    assert _error(found, expected) < 1.2 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [20, 128, 256])
def test_the_first_layer_loses_nothing_but_its_result_s_rounding(dtype: torch.dtype, width: int) -> None:
    pixels = torch.randint(0, 256, (2, 9, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight, bias = _random(32, 3, 3, 3) / 5, _random(32, seed=1)
    found = stem(pixels.to(DEVICE), stem_weight(weight, dtype), bias)
    images = (pixels.to(DEVICE).double() / 127.5 - 1).permute(0, 3, 1, 2)
    expected = F.conv2d(images, weight.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    assert _error(found.values, expected) < ROUNDING[dtype]
    assert _error(found.sums.double().sum(1)[:, 0], expected.sum((1, 2))) < 10 * ROUNDING[dtype]


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize(("channels", "codes"), [(8, 100), (64, 300), (256, 5000)])
def test_the_nearest_code_is_the_nearest_whatever_the_magnitudes(spread: float, channels: int, codes: int) -> None:
    vectors, entries = _random(301, channels), 1e-3 * _random(codes, channels, seed=1)
    vectors = 1e-3 * vectors * torch.logspace(-spread, spread, 301, device=DEVICE)[:, None]
    found = nearest(vectors, Codebook.of(entries, -entries.square().sum(1) / 2))
    distances = torch.cdist(vectors.double(), entries.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    # The best, or as good as float32 can tell: of two products of unlike size it sees about seven digits.
    chosen = distances.gather(1, found.long()[:, None])[:, 0]
    size = vectors.double().norm(dim=1) * entries.double().norm(dim=1).max()
    assert ((chosen - distances.amin(1)) <= 1e-6 * size).all()
    assert (found == distances.argmin(1)).float().mean() > 0.99
