"""The audio tokenizer encodes, decodes, saves, loads, refuses, and can be trained. Tiny random architectures."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sequence import VocabularyError
from pipelines.tokenizers import train_audio
from pipelines.tokenizers.audio_data import Sounds, Strip
from pipelines.tokenizers.audio_losses import ReconstructionLoss, fourier_basis, mel_filters, spectra
from pipelines.tokenizers.audio_quantizer import CodebookTrainer
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.encodec import AudioTokenizer, AudioTokenizerConfig, EncodecNetwork
from pipelines.tokenizers.replay import Replay

TINY = AudioTokenizerConfig(
    sample_rate_hz=16_000, n_q=4, codebook_size=64, n_filters=4, ratios=(4, 4, 2), dimension=16, lstm=1
)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def tiny_network() -> EncodecNetwork:
    torch.manual_seed(0)
    network = EncodecNetwork(TINY)
    network.initialise()
    waveforms = torch.from_numpy(noise(16 * 3200)).view(16, 1, 3200)
    CodebookTrainer(network).initialise(network.encoder(waveforms).detach())
    return network


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    return AudioTokenizer(tiny_network(), name="tiny", sha256="")


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 1500))
def test_a_clip_has_as_many_frames_as_hops_begun(tokenizer: AudioTokenizer, samples: int) -> None:
    codes = tokenizer.encode([noise(samples)])[0]
    assert codes.shape == (-(-samples // TINY.hop), TINY.n_q)
    assert codes.dtype == np.int32
    assert tokenizer.decode(codes).shape == (len(codes) * TINY.hop,)


def test_codes_tell_sounds_apart(tokenizer: AudioTokenizer) -> None:
    codes = tokenizer.encode([noise(16_000)])[0]
    assert all(len(np.unique(column)) > 16 for column in codes.T)


def test_codes_do_not_depend_on_the_neighbours(tokenizer: AudioTokenizer) -> None:
    clips = [noise(length, seed) for seed, length in enumerate((1000, 333, 4096, 1000, 31))]
    alone = [tokenizer.encode([clip])[0] for clip in clips]
    for together, single in zip(tokenizer.encode(clips), alone, strict=True):
        np.testing.assert_array_equal(together, single)


def test_later_sound_does_not_change_earlier_codes(tokenizer: AudioTokenizer) -> None:
    clip = noise(3200)
    louder = np.concatenate([clip[:1600], 5 * clip[1600:]])
    before, after = tokenizer.encode([clip, louder])
    np.testing.assert_array_equal(before[: 1600 // TINY.hop], after[: 1600 // TINY.hop])
    assert (before != after).any()


def test_a_view_has_the_first_codebooks(tokenizer: AudioTokenizer) -> None:
    view = AudioTokenizer(tokenizer.network, name="tiny", sha256="", n_q=2)
    codes, fewer = tokenizer.encode([noise(2000)])[0], view.encode([noise(2000)])[0]
    np.testing.assert_array_equal(fewer, codes[:, :2])
    np.testing.assert_array_equal(view.decode(fewer), tokenizer.decode(codes[:, :2]))
    with pytest.raises(ValueError, match="n_q is 5, but the audio tokenizer tiny has 1 to 4"):
        AudioTokenizer(tokenizer.network, name="tiny", sha256="", n_q=5)


@pytest.mark.parametrize("value", [-1, 64])
def test_a_code_outside_its_codebook_is_named(tokenizer: AudioTokenizer, value: int) -> None:
    codes = np.zeros((10, 4), np.int32)
    codes[7, 3] = value
    with pytest.raises(VocabularyError, match=rf"code {value} of codebook 3 in frame 7 lies outside \[0, 64\)"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("shape", [(0, 4), (10, 5), (10, 0), (10,)])
def test_codes_of_another_shape_are_refused(tokenizer: AudioTokenizer, shape: tuple[int, ...]) -> None:
    with pytest.raises(VocabularyError, match="shape"):
        tokenizer.decode(np.zeros(shape, np.int32))


@pytest.mark.parametrize("waveform", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32)])
def test_a_waveform_that_is_empty_or_not_mono_is_refused(tokenizer: AudioTokenizer, waveform: np.ndarray) -> None:
    with pytest.raises(ValueError, match="waveform 1 has shape"):
        tokenizer.encode([noise(100), waveform])


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    loaded = AudioTokenizer.load(tokenizer.save(tmp_path / "sound"))
    codes = tokenizer.encode([noise(3000)])[0]
    np.testing.assert_array_equal(loaded.encode([noise(3000)])[0], codes)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))
    assert loaded.name == "sound"
    assert (loaded.hop, loaded.frame_rate_hz, loaded.codebook_size, loaded.n_q) == (32, 500.0, 64, 4)
    again = AudioTokenizer.load(loaded.save(tmp_path / "again"), n_q=2)
    assert again.sha256 == loaded.sha256
    assert AudioTokenizer.load(tokenizer.save(tmp_path / "half", torch.float16)).sha256 != loaded.sha256


def test_weights_of_another_architecture_are_refused(tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    folder = tokenizer.save(tmp_path / "sound")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dimension": 16', '"dimension": 8'))
    with pytest.raises(CheckpointError, match=r"shape .* not "):
        AudioTokenizer.load(folder)
    config.write_text(config.read_text().replace('"dimension"', '"dimensions"'))
    with pytest.raises(CheckpointError, match=r"unknown keys \['dimensions'\]"):
        AudioTokenizer.load(folder)


def test_a_checkpoint_with_weight_normalization_loads_as_released(tmp_path: Path) -> None:
    config = AudioTokenizerConfig(
        sample_rate_hz=24_000, n_q=2, codebook_size=64, n_filters=4, norm="weight_norm", pad_mode="reflect"
    )
    network = EncodecNetwork(config)
    whole = network.state_dict()
    assert any(name.endswith("weight_g") for name in whole)
    copy = EncodecNetwork(config)
    copy.load_weights(whole, "released")
    one, other = (AudioTokenizer(n, name="x", sha256="") for n in (network, copy))
    np.testing.assert_array_equal(one.encode([noise(5000)])[0], other.encode([noise(5000)])[0])


def test_no_stub_of_torchaudio_is_left_behind(tokenizer: AudioTokenizer) -> None:
    assert "encodec" in sys.modules
    stub = sys.modules.get("torchaudio")
    assert stub is None or stub.__file__ is not None


def test_the_initial_network_passes_sound_at_its_level() -> None:
    network = tiny_network()
    waveforms = torch.from_numpy(noise(8 * 6400)).view(8, 1, 6400)
    latents = network.encoder(waveforms).detach()
    assert 0.2 < float(latents.std()) < 5
    # What is told apart is the sound, not a constant.
    assert float(latents.mean(dim=(0, 2)).std()) < float(latents.std(dim=(0, 2)).mean())


def test_the_training_quantizer_agrees_with_the_package_and_depths_mask_codebooks() -> None:
    network = tiny_network()
    codebooks = CodebookTrainer(network)
    latents = network.encoder(torch.from_numpy(noise(4 * 3200)).view(4, 1, 3200)).detach().requires_grad_()
    quantizer = network.quantizer.vq
    expected = {depth: quantizer.decode(quantizer.encode(latents, n_q=depth)).detach() for depth in (1, 4)}
    quantized = codebooks.quantize(latents, torch.tensor([1, 4, 4, 1]))
    for row, depth in enumerate((1, 4, 4, 1)):
        torch.testing.assert_close(quantized.latents[row].detach(), expected[depth][row], atol=1e-5, rtol=1e-5)
    assert quantized.counts.shape == (4, 64)
    assert quantized.counts.sum(dim=1).tolist() == [400.0] * 4
    assert quantized.residuals.shape == (4, 400, 16)
    (quantized.latents.sum() + 0 * quantized.commitment).backward()
    torch.testing.assert_close(latents.grad, torch.ones_like(latents))


def test_dead_entries_are_restarted_from_the_batch() -> None:
    network = tiny_network()
    codebook = network.codebooks[0]
    codebook.embed[:60] = 1e3
    codebooks = CodebookTrainer(network)
    codebooks.adopt()
    codebook.cluster_size[:60] = 0.0
    latents = network.encoder(torch.from_numpy(noise(32 * 3200)).view(32, 1, 3200)).detach()
    for _ in range(3):
        quantized = codebooks.quantize(latents, torch.full((32,), 4))
        codebooks.restart(quantized.residuals)
    assert int((codebooks.quantize(latents, torch.full((32,), 4)).counts[0] > 0).sum()) > 40


def test_the_loss_is_zero_for_a_perfect_copy_and_grows_with_the_error() -> None:
    loss = ReconstructionLoss(16_000)
    original = torch.from_numpy(noise(2 * 8000)).view(2, 1, 8000)
    values = [float(sum(loss(original, original * scale).values())) for scale in (1.0, 0.9, 0.5)]
    assert values[0] == pytest.approx(0.0, abs=1e-5)
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize(("window", "bands"), [(64, 8), (512, 48), (2048, 120)])
def test_every_mel_band_hears_something(window: int, bands: int) -> None:
    filters = mel_filters(16_000, window, bands)
    torch.testing.assert_close(filters.sum(dim=1), torch.ones(bands))
    assert (filters >= 0).all()


@pytest.mark.parametrize("window", [256, 1024])
def test_the_spectra_of_the_loss_are_short_time_fourier_transforms(window: int) -> None:
    waveforms = torch.from_numpy(noise(2 * 6400)).view(2, 1, 6400)
    taper = torch.hann_window(window)
    expected = torch.stft(waveforms[:, 0], window, window // 4, window=taper, return_complex=True)
    found = spectra(waveforms, fourier_basis(window))
    torch.testing.assert_close(
        torch.complex(found[:, :, 0], found[:, :, 1]).transpose(1, 2), expected / taper.square().sum().sqrt(),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert float(found.square().sum(dim=2).mean().sqrt()) == pytest.approx(0.1, rel=0.1)


def test_a_step_that_cannot_be_captured_goes_on_without_a_graph() -> None:
    said: list[str] = []
    calls: list[int] = []

    def step() -> int:
        calls.append(len(calls))
        if len(calls) == 9:
            raise RuntimeError("an operation that a graph cannot hold")
        return calls[-1]

    replay = Replay(step, enabled=True, say=said.append)
    assert [replay() for _ in range(7)] == list(range(7))
    # No device here: the capture itself fails, as it would on an operation that waits for the host.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_capture", step)
        patch.setattr(replay, "step", step)
        assert replay() == 7
    assert "NO CUDA GRAPH" in said[0]
    assert "an operation that a graph cannot hold" in said[0]
    assert replay() == 9


def tones(count: int) -> Sounds:
    rng = np.random.default_rng(0)
    time = np.arange(16_000) / 16_000
    waves = [
        0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time) + rng.normal(0, 0.01, 16_000) for _ in range(count)
    ]
    return Sounds(
        {f"tones/{index}.wav": np.round(wave * 32767).astype(np.int16) for index, wave in enumerate(waves)}, 16_000
    )


def test_the_split_stays_when_sounds_come(tmp_path: Path) -> None:
    many, few = tones(200), tones(100)
    held_out = set(many.split()[1])
    assert 0 < len(held_out) < 20
    assert set(few.split()[1]) == held_out & set(few.clips)
    many.save(tmp_path / "cache.safetensors")
    again = Sounds.read(tmp_path / "cache.safetensors", 16_000)
    assert again.split() == many.split()
    np.testing.assert_array_equal(again.clips["tones/7.wav"], many.clips["tones/7.wav"])
    with pytest.raises(ValueError, match="16000 Hz, but the tokenizer has 24000 Hz"):
        Sounds.read(tmp_path / "cache.safetensors", 24_000)


def test_crops_are_the_sounds_at_their_gains_and_stay_in_range() -> None:
    sounds = tones(20)
    strip = Strip(sounds, list(sounds.clips), 3200, torch.device("cpu"), seed=1)
    starts = torch.tensor([0, 500, strip.starts - 1])
    crops = strip.crops(starts, torch.tensor([0.0, -6.0, 30.0]))
    assert crops.shape == (3, 1, 3200)
    torch.testing.assert_close(crops[0, 0], strip.samples[:3200].float() / 32767)
    torch.testing.assert_close(crops[1, 0], 10 ** (-6 / 20) * strip.samples[500:3700].float() / 32767)
    assert float(crops.abs().max()) == pytest.approx(1.0)
    other = Strip(sounds, list(sounds.clips), 3200, torch.device("cpu"), seed=2)
    assert not torch.equal(other.samples, strip.samples)
    with pytest.raises(ValueError, match="fewer than one crop"):
        Strip(sounds, list(sounds.clips)[:1], 32_000, torch.device("cpu"), seed=1)


def test_a_short_training_lowers_the_loss_and_leaves_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_audio, "WARMUP_STEPS", 3)
    tones(120).save(tmp_path / "cache.safetensors")

    def options(out: str, **changes: object) -> train_audio.AudioTrainingOptions:
        values: dict[str, object] = {
            "data": tmp_path / "cache.safetensors", "out": tmp_path / out, "config": TINY, "device": "cpu",
            "batch_size": 4, "crop_seconds": 0.2, "learning_rate": 3e-3, "max_steps": 24, "minutes": 5.0,
        }  # fmt: skip
        return train_audio.AudioTrainingOptions(**(values | changes))  # type: ignore[arg-type]

    losses: list[float] = []
    report = train_audio._Clock.report
    monkeypatch.setattr(
        train_audio._Clock, "report", lambda self, step, progress, values, *_: losses.append(values["waveform"])
    )
    monkeypatch.setattr(train_audio, "REPORT_EVERY", 1)
    first = train_audio.train(options("first"))
    assert len(losses) == 24
    assert np.mean(losses[8:11]) < np.mean(losses[:3])
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    monkeypatch.setattr(train_audio._Clock, "report", report)
    second = train_audio.train(options("second", init=first, max_steps=2))
    for folder in (first, second):
        tokenizer = AudioTokenizer.load(folder)
        assert tokenizer.encode([noise(1000)])[0].shape == (32, 4)
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "weights.safetensors", "card.md", "card.json", "samples.png", "samples.wav",
        }  # fmt: skip
        assert tokenizer.sha256 in (folder / "card.md").read_text()
