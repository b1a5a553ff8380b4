"""The audio tokenizer's kernels against the package's modules in float64: on a GPU, or in Triton's interpreter on a CPU.

The interpreter needs the package triton, which comes with torch for CUDA; without it, most of this file is skipped.
"""

import copy
import importlib.util
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.audio_quantizer import CodebookTrainer
from pipelines.tokenizers.clip_batches import BATCH_SAMPLES, batches
from pipelines.tokenizers.encodec import AudioTokenizer, record_agreement
from pipelines.tokenizers.encodec_network import EncodecNetwork

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
needs_gpu = pytest.mark.skipif(not CUDA, reason="no GPU")

SHAPE: dict[str, Any] = {"sample_rate_hz": 16_000, "n_q": 3, "codebook_size": 32, "ratios": (4, 2)}
PLAIN = AudioTokenizerConfig(**SHAPE, n_filters=8, dimension=16, lstm=0)
WIDE = AudioTokenizerConfig(**SHAPE, n_filters=64, dimension=16, lstm=0)
ODD = AudioTokenizerConfig(**SHAPE, n_filters=6, dimension=24, lstm=2, pad_mode="reflect", true_skip=True)


def network_of(config: AudioTokenizerConfig) -> EncodecNetwork:
    """Random weights under which every layer matters, and codebooks that fit."""
    torch.manual_seed(0)
    network = EncodecNetwork(config).eval().requires_grad_(False)
    network.initialise()
    for name, parameter in network.encoder.named_parameters():
        if "lstm" in name:
            # Larger weights make it chaotic: float32 itself is then far from float64.
            torch.nn.init.normal_(parameter, std=(parameter.shape[0] / 4) ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
    CodebookTrainer(network).initialise(network.encoder(torch.randn(8, 1, 100 * config.hop) * 0.3))
    return network.to(DEVICE)


def sounds(clips: int, frames: int, config: AudioTokenizerConfig) -> torch.Tensor:
    return torch.randn(clips, frames * config.hop, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 0.3


def latents_of(network: EncodecNetwork, waveforms: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(network.encoder).double()(waveforms[:, None].double()).transpose(1, 2)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_triton
@pytest.mark.parametrize("config", [PLAIN, WIDE, ODD], ids=["plain", "wide", "odd"])
@pytest.mark.parametrize(("split", "bound"), [(True, 1e-5), (False, 3e-3)])
def test_the_kernels_compute_the_networks_latents(config: AudioTokenizerConfig, split: bool, bound: float) -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    network, waveforms = network_of(config), sounds(2, 9, config)
    encoder = FastEncoder(network, split=split, device=DEVICE)
    found = encoder.latents(waveforms)
    assert error(found[..., : config.dimension], latents_of(network, waveforms)) < bound
    assert not found[..., config.dimension :].any()


@needs_triton
def test_a_clips_codes_do_not_depend_on_what_is_beside_or_behind_it() -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    network, waveforms = network_of(ODD), sounds(3, 12, ODD)
    encoder = FastEncoder(network, split=False, device=DEVICE)
    together = encoder.encode(waveforms, 3)
    alone = encoder.encode(waveforms[1:2], 3)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=0)
    longer = encoder.encode(torch.nn.functional.pad(waveforms[2:], (0, 5 * ODD.hop)), 3)
    torch.testing.assert_close(longer[0, :12], together[2], rtol=0, atol=0)


@needs_triton
def test_weight_normalization_is_folded_in() -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    torch.manual_seed(0)
    config = AudioTokenizerConfig(**SHAPE, n_filters=8, dimension=16, lstm=0, norm="weight_norm", pad_mode="reflect")
    network = EncodecNetwork(config).eval().requires_grad_(False).to(DEVICE)
    for name, parameter in network.encoder.named_parameters():
        if name.endswith("weight_g"):
            parameter.mul_(1.5)
    waveforms = sounds(1, 8, config)
    found = FastEncoder(network, split=True, device=DEVICE).latents(waveforms)
    # In float32: the package's weight normalization leaves no weight that could be copied and cast.
    expected = network.encoder(waveforms[:, None]).transpose(1, 2)
    assert error(found, expected) < (1e-5 if not CUDA else 2e-3)


@needs_triton
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_search_finds_the_nearest_entries_however_far_from_zero(mean: float) -> None:
    from pipelines.tokenizers.encodec_fast import Codebooks

    generator = torch.Generator().manual_seed(0)
    books = [torch.randn(40, 20, generator=generator) * 0.7**depth for depth in range(4)]
    books[0] += mean
    latents = torch.randn(200, 20, generator=generator) + mean
    residual, expected = latents.double(), []
    for book in books:
        expected.append(torch.cdist(residual, book.double()).argmin(dim=1))
        residual = residual - book.double()[expected[-1]]
    padded = torch.nn.functional.pad(latents, (0, 12)).to(DEVICE)
    found = Codebooks(books, DEVICE).nearest(padded, 4).cpu()
    assert (found == torch.stack(expected, dim=1)).double().mean() > (0.999 if not mean else 0.98)


@needs_triton
def test_frames_that_are_not_finite_have_no_codes() -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    network, waveforms = network_of(PLAIN), sounds(2, 8, PLAIN)
    waveforms[1, 40] = float("nan")
    codes = FastEncoder(network, split=True, device=DEVICE).encode(waveforms, 3)
    assert int(codes[0].min()) >= 0
    assert (codes[1, 40 // PLAIN.hop] == -1).all()
    assert int(codes[1, 0].min()) >= 0


@needs_triton
@pytest.mark.parametrize(
    "change",
    [{"channels": 2}, {"causal": False}, {"n_residual_layers": 2}, {"causal": False, "norm": "time_group_norm"}],
)
def test_an_architecture_without_kernels_is_refused(change: dict[str, Any]) -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    network = EncodecNetwork(AudioTokenizerConfig(**SHAPE, n_filters=4, dimension=16, **change))
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .* Use dtype float32"):
        FastEncoder(network, split=True, device=DEVICE)


@needs_triton
def test_a_clip_shorter_than_the_last_kernel_is_refused() -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    with pytest.raises(ValueError, match="clips of 6 frames: the fast encoder takes 7 to"):
        FastEncoder(network_of(PLAIN), split=True, device=DEVICE).encode(sounds(1, 6, PLAIN), 3)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"dtype": "float16"}, "float16 is for CUDA devices, and this is cpu"), ({"dtype": "int8"}, "found int8"),
     ({"batch_size": 0}, "found float32 and 0")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AudioTokenizer(network_of(PLAIN), name="tiny", sha256="", **settings_)


def test_agreement_is_by_codebook() -> None:
    network = network_of(PLAIN)
    tokenizer = AudioTokenizer(network, name="tiny", sha256="", device=DEVICE)
    other = copy.deepcopy(network)
    other.codebooks[1].embed.mul_(-1)
    changed = AudioTokenizer(other, name="changed", sha256="", device=DEVICE)
    clips = [clip.cpu().numpy() for clip in sounds(4, 20, PLAIN)]
    np.testing.assert_array_equal(tokenizer.agreement(tokenizer, clips), [1.0, 1.0, 1.0])
    shares = changed.agreement(tokenizer, clips)
    assert shares[0] == 1.0
    assert (shares[1:] < 0.5).all()


def test_agreement_is_recorded_in_the_card(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"name": "tiny", "agreement": {"float16": {"equal": 0.5}}}')
    record_agreement(tmp_path, "float16x2", np.array([1.0, 0.99]), over="4 clips", hardware="a GPU")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["agreement"]["float16"] == {"equal": 0.5}
    assert card["agreement"]["float16x2"] == {
        "equal": 0.995, "by_codebook": [1.0, 0.99], "over": "4 clips", "hardware": "a GPU",
    }  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(frames=st.lists(st.integers(1, 60_000), max_size=40), size=st.integers(1, 9))
def test_batches_hold_every_clip_once_and_bounded_samples(frames: list[int], size: int) -> None:
    found = list(batches(frames, 320, size))
    assert sorted(index for batch in found for index in batch) == list(range(len(frames)))
    for batch in found:
        longest = max(frames[index] for index in batch)
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * longest * 320 <= BATCH_SAMPLES


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16x2", "float16"])
def test_on_a_gpu_a_fast_tokenizer_agrees_and_repeats(dtype: Any) -> None:
    config = AudioTokenizerConfig(sample_rate_hz=24_000, n_q=8, codebook_size=64, pad_mode="reflect")
    network = network_of(config)
    generator = np.random.default_rng(0)
    clips = [generator.normal(0, 0.1, n).astype(np.float32) for n in (24_000, 333, 100_000, 24_000, 1, 70_001)]
    exact = AudioTokenizer(network, name="random", sha256="", device="cuda")
    fast = AudioTokenizer(network, name="random", sha256="", device="cuda", dtype=dtype, batch_size=4)
    codes = fast.encode(clips)
    for clip, together in zip(clips, codes, strict=True):
        np.testing.assert_array_equal(fast.encode([clip])[0], together)
        assert together.shape == (-(-len(clip) // 320), 8)
    assert fast.agreement(exact, clips).mean() > (0.995 if dtype == "float16x2" else 0.97)
    with pytest.raises(FloatingPointError, match="waveform 1 of 2"):
        fast.encode([clips[0], np.full(2000, np.nan, np.float32)])


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_another_thread_may_stage_the_next_clips() -> None:
    network = network_of(AudioTokenizerConfig(sample_rate_hz=24_000, n_q=8, codebook_size=64, pad_mode="reflect"))
    fast = AudioTokenizer(network, name="random", sha256="", device="cuda", dtype="float16x2", batch_size=4)
    generator = np.random.default_rng(0)
    windows = [[generator.normal(0, 0.1, n).astype(np.float32) for n in (9000, 700, 24_000)] * 3 for _ in range(3)]
    with ThreadPoolExecutor(1) as other:
        started = [other.submit(fast.stage, window).result()() for window in windows]
        for window, result in zip(windows, started, strict=True):
            for codes, expected in zip(result(), fast.encode(window), strict=True):
                np.testing.assert_array_equal(codes, expected)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_another_thread_may_page_lock_memory_while_graphs_are_captured() -> None:
    network = network_of(AudioTokenizerConfig(sample_rate_hz=24_000, n_q=8, codebook_size=64, pad_mode="reflect"))
    fast = AudioTokenizer(network, name="random", sha256="", device="cuda", dtype="float16x2")
    done = threading.Event()

    def locking() -> int:
        pieces = []
        while not done.is_set():
            # Larger than any before, so that none of the memory that torch keeps will do.
            pieces.append(torch.empty(2**20 + 2**12 * len(pieces), dtype=torch.uint8, pin_memory=True))
        return len(pieces)

    with ThreadPoolExecutor(1) as other:
        locked = other.submit(locking)
        try:
            for clips in (1, 2, 4, 8, 16, 32, 64):
                fast.encode([np.full(24_000, 0.1, np.float32)] * clips)
        finally:
            done.set()
        assert locked.result() > 7


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("split", "bound"), [(True, 1e-5), (False, 3e-3)])
def test_on_a_gpu_the_released_architecture_is_computed(split: bool, bound: float) -> None:
    from pipelines.tokenizers.encodec_fast import FastEncoder

    config = AudioTokenizerConfig(sample_rate_hz=24_000, n_q=2, pad_mode="reflect")
    network = EncodecNetwork(config).eval().requires_grad_(False)
    network.initialise()
    waveforms = sounds(3, 70, config)
    found = FastEncoder(network.to(DEVICE), split=split, device=DEVICE).latents(waveforms)
    assert error(found, latents_of(network, waveforms)) < bound
