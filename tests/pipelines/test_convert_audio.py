"""EnCodec as its package and as Hugging Face release it gives the same codes and sounds here."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrizations import weight_norm

from pipelines.sequence import VocabularyError
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.convert import convert
from pipelines.tokenizers.convert_encodec import fold_weight_norm
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.loudness import loudness_codes, loudness_gains
from tests.pipelines.released import encodec_24khz, encodec_48khz, fill_codebooks, noise


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def released(folder: Path, model: Any, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def model_24khz() -> Any:
    return encodec_24khz()


@pytest.fixture(scope="module")
def model_48khz() -> Any:
    model = encodec_48khz()
    model.overlap = 0.0
    return model


@pytest.fixture(scope="module")
def mine_24khz(model_24khz: Any, tmp_path_factory: pytest.TempPathFactory) -> AudioTokenizer:
    folder = tmp_path_factory.mktemp("24")
    return AudioTokenizer.load(convert(released(folder, model_24khz, "encodec_24khz-0.th"), folder / "mine"))


@pytest.fixture(scope="module")
def mine_48khz(model_48khz: Any, tmp_path_factory: pytest.TempPathFactory) -> AudioTokenizer:
    folder = tmp_path_factory.mktemp("48")
    return AudioTokenizer.load(convert(released(folder, model_48khz, "encodec_48khz-0.th"), folder / "mine"))


def completed(waveform: np.ndarray, hop: int) -> torch.Tensor:
    """[1, 1, samples], a whole number of frames, as Braid completes a clip."""
    return torch.from_numpy(np.pad(waveform, (0, -len(waveform) % hop)))[None, None]


@torch.no_grad()
def codes_of(model: Any, waveform: np.ndarray) -> np.ndarray:
    """What the package's own `encode` gives, [frames, K]."""
    clip = completed(waveform, 40).expand(-1, model.channels, -1)
    return torch.cat([codes for codes, _ in model.encode(clip)], dim=2)[0].T.numpy()


CLIPS = [noise(samples, seed) for seed, samples in enumerate((24_000, 9_973, 40, 17, 4_000))]


def test_the_24_khz_model_gives_the_codes_and_the_sound_of_the_package(
    model_24khz: Any, mine_24khz: AudioTokenizer
) -> None:
    theirs = [codes_of(model_24khz, clip) for clip in CLIPS]
    ours = mine_24khz.encode(CLIPS)
    assert (mine_24khz.sample_rate_hz, mine_24khz.hop, mine_24khz.n_q) == (24_000, 40, 4)
    assert all(len(np.unique(column)) > 16 for column in ours[0].T)
    # Weight normalization is computed in float64 here and in float32 there, the last bit of some weights differs.
    equal, total = sum((a == b).sum() for a, b in zip(ours, theirs, strict=True)), sum(a.size for a in ours)
    assert equal >= 0.999 * total
    with torch.no_grad():
        (said,) = model_24khz.decode(model_24khz.encode(completed(CLIPS[0], 40)))[0].numpy()
    np.testing.assert_allclose(mine_24khz.decode(theirs[0]), said, atol=1e-5)


def test_with_the_folded_weights_the_package_gives_the_same_codes_to_the_bit(mine_24khz: AudioTokenizer) -> None:
    plain = encodec_24khz()
    for name, module in plain.named_modules():
        if hasattr(module, "weight_g"):
            torch.nn.utils.remove_weight_norm(module)
            module.weight.data.copy_(mine_24khz.network.state_dict()[f"{name}.weight"])
    for clip, codes in zip(CLIPS, mine_24khz.encode(CLIPS), strict=True):
        np.testing.assert_array_equal(codes, codes_of(plain, clip))


def test_the_48_khz_model_gives_the_codes_of_the_package_after_the_loudness(
    model_48khz: Any, mine_48khz: AudioTokenizer
) -> None:
    clips = [noise(samples, seed) for seed, samples in enumerate((120_000, 48_000, 96_040, 30_011, 25))]
    ours = mine_48khz.encode(clips)
    assert (mine_48khz.sample_rate_hz, mine_48khz.n_q, mine_48khz.config.segment_frames) == (48_000, 5, 1200)
    for clip, codes in zip(clips, ours, strict=True):
        assert codes.shape == (-(-len(clip) // 40), 5)
        np.testing.assert_array_equal(codes[:, 1:], codes_of(model_48khz, clip))
    assert all(len(np.unique(column)) > 16 for column in ours[0][:, 1:].T)


def test_a_quiet_second_stays_quiet_through_the_48_khz_model(model_48khz: Any, mine_48khz: AudioTokenizer) -> None:
    clip = noise(144_000)
    clip[48_000:96_000] *= 0.01
    clip[96_000:] = 0
    with torch.no_grad():
        said = model_48khz.decode(model_48khz.encode(completed(clip, 40).expand(-1, 2, -1))).mean(dim=1)[0].numpy()
    heard = mine_48khz.decode(mine_48khz.encode([clip])[0])
    rms = [float(np.sqrt(np.square(heard[at : at + 48_000]).mean())) for at in (0, 48_000, 96_000)]
    assert 20 * np.log10(rms[0] / rms[1]) == pytest.approx(40, abs=5)
    assert rms[2] < 1e-4
    # Codes of 64 steps are 1.6 dB apart here; released codebooks have 1,024, 0.1 dB apart.
    np.testing.assert_allclose(heard[:48_000], said[:48_000], rtol=0.11, atol=1e-4)


def test_loudness_is_no_sound_by_itself_and_comes_with_every_view(mine_48khz: AudioTokenizer) -> None:
    clip = noise(50_000)
    view = AudioTokenizer(mine_48khz.network, name="x", sha256="", n_q=3)
    np.testing.assert_array_equal(view.encode([clip])[0], mine_48khz.encode([clip])[0][:, :3])
    with pytest.raises(ValueError, match="n_q is 1, but the audio tokenizer x has 2 to 5 codebooks"):
        AudioTokenizer(mine_48khz.network, name="x", sha256="", n_q=1)
    with pytest.raises(VocabularyError, match="K from 2 to 5"):
        mine_48khz.decode(np.zeros((3, 1), np.int32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_48_khz_model_gives_the_codes_of_the_cpu_whatever_the_neighbours(
    mine_48khz: AudioTokenizer,
) -> None:
    clips = [noise(samples, seed) for seed, samples in enumerate((120_000, 48_000, 96_040, 30_011, 25))]
    on_cpu = mine_48khz.encode(clips)
    on_gpu = AudioTokenizer(copy.deepcopy(mine_48khz.network), name="x", sha256="", device="cuda")
    together = on_gpu.encode(clips)
    for clip, codes in zip(clips, together, strict=True):
        np.testing.assert_array_equal(on_gpu.encode([clip])[0], codes)
    assert (np.concatenate(on_cpu) == np.concatenate(together)).mean() > 0.99
    for decoded, codes in zip(on_gpu.decode_batch(on_cpu), on_cpu, strict=True):
        np.testing.assert_allclose(decoded, mine_48khz.decode(codes), atol=1e-3)


@given(rms=st.floats(1e-5, 1.3))
def test_loudness_survives_as_a_code_within_half_a_step(rms: float) -> None:
    codes = loudness_codes(torch.tensor([rms]), 1024)
    assert 0 <= int(codes) < 1024
    assert 20 * np.log10(float(loudness_gains(codes, 1024)) / rms) == pytest.approx(0, abs=0.051)


@given(rms=st.sampled_from([0.0, 1e-30, 5.0, 1e9]), size=st.sampled_from([2, 64, 1024]))
def test_what_is_out_of_range_is_the_first_or_the_last_code(rms: float, size: int) -> None:
    assert int(loudness_codes(torch.tensor([rms]), size)) == (0 if rms < 1 else size - 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(4, 3, 5), (1, 1, 1), (6, 2, 8)]))
def test_folding_gives_the_weights_that_torch_computes_in_either_naming(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    layer = weight_norm(torch.nn.Conv1d(shape[1], shape[0], shape[2]))
    state = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    old = {
        "a.bias": state["a.bias"],
        "a.weight_g": state["a.parametrizations.weight.original0"],
        "a.weight_v": state["a.parametrizations.weight.original1"],
    }
    folded, count = fold_weight_norm(state)
    assert (count, set(folded)) == (1, {"a.bias", "a.weight"})
    torch.testing.assert_close(folded["a.weight"], layer.weight.detach(), rtol=3e-7, atol=0)
    torch.testing.assert_close(fold_weight_norm(old)[0], folded, rtol=0, atol=0)
    del old["a.weight_v"]
    with pytest.raises(CheckpointError, match=r"a\.weight_g is there, a\.weight_v is not"):
        fold_weight_norm(old)


def test_the_card_says_what_was_folded(model_24khz: Any, model_48khz: Any, tmp_path: Path) -> None:
    for name, model, said in (
        (
            "encodec_24khz-0.th",
            model_24khz,
            ["Weight normalization of 28 layers", "24000 Hz, 600 frames a second, 4 codebooks"],
        ),
        ("encodec_48khz-0.th", model_48khz, ["the first of them the loudness", "with an overlap of 0", "stereo"]),
    ):
        out = convert(released(tmp_path, model, name), tmp_path / name.split("-")[0])
        text = (out / "card.md").read_text()
        assert json.loads((out / "card.json").read_text())["source"]["layout"] == "encodec state dict"
        for words in said:
            assert words in text, words


def test_what_is_no_whole_encodec_is_refused(model_24khz: Any, tmp_path: Path) -> None:
    state = model_24khz.state_dict()
    cut = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.model.0")}
    torch.save(cut, tmp_path / "cut.th")
    with pytest.raises(
        CheckpointError, match=r"cut\.th: the weights do not fit the config: decoder\.model\.0\S+ is missing"
    ):
        convert(tmp_path / "cut.th", tmp_path / "mine")
    torch.save({name: tensor for name, tensor in state.items() if "quantizer" not in name}, tmp_path / "cut.th")
    with pytest.raises(CheckpointError, match=r"no whole EnCodec model: .* 0 codebooks found"):
        convert(tmp_path / "cut.th", tmp_path / "mine")
    save_file({"lm.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"neither EnCodec nor a VQGAN .* \['lm\.weight'\]"):
        convert(tmp_path / "other.safetensors", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_tokenizer_of_braid_is_not_converted_again(mine_24khz: AudioTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a tokenizer of Braid already"):
        convert(mine_24khz.save(tmp_path / "mine"), tmp_path / "again")


HUGGING_FACE: dict[str, dict[str, Any]] = {
    "encodec_24khz": {},
    "encodec_32khz": {
        "sampling_rate": 32_000, "use_causal_conv": False, "use_conv_shortcut": False, "codebook_size": 128,
        "target_bandwidths": [22.4],
    },
    "encodec_48khz": {
        "sampling_rate": 48_000, "audio_channels": 2, "normalize": True, "chunk_length_s": 1.0, "overlap": 0.01,
        "norm_type": "time_group_norm", "use_causal_conv": False, "target_bandwidths": [28.8],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True], ids=["original0", "weight_g"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_give_the_same_codes_and_sound(tmp_path: Path, name: str, older: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [5, 4, 2],
        "num_lstm_layers": 1,
        "codebook_size": 64,
    }
    shape |= {"target_bandwidths": [14.4]}
    model = transformers.EncodecModel(transformers.EncodecConfig(**(shape | HUGGING_FACE[name]))).eval()
    rate = model.config.sampling_rate
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            # Random biases are larger than the signal, and would leave latents that hardly move.
            if part.endswith("conv.bias"):
                parameter.zero_()
    fill_codebooks(model, noise(rate))
    model.save_pretrained(tmp_path / "hf")
    if older:
        file = tmp_path / "hf" / "model.safetensors"
        old = {"original0": "weight_g", "original1": "weight_v"}
        tensors = {
            ".".join([*key.split(".")[:-3], old[key.split(".")[-1]]]) if "parametrizations" in key else key: tensor
            for key, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    mine = AudioTokenizer.load(convert(tmp_path / "hf", tmp_path / "mine"))
    assert (mine.sample_rate_hz, mine.n_q) == (rate, model.config.num_quantizers + model.config.normalize)
    model.config.overlap = 0.0
    clip = noise(2 * rate + 4000)
    clip = clip[: len(clip) // 40 * 40]
    heard = torch.from_numpy(clip)[None, None].expand(-1, model.config.audio_channels, -1)
    with torch.no_grad():
        theirs = model.encode(heard, bandwidth=model.config.target_bandwidths[-1])
        said = model.decode(theirs.audio_codes, theirs.audio_scales, last_frame_pad_length=theirs.last_frame_pad_length)
    segments = theirs.audio_codes[:, 0].permute(0, 2, 1).flatten(0, 1)[: len(clip) // 40].numpy()
    (ours,) = mine.encode([clip])
    residual = ours[:, 1:] if model.config.normalize else ours
    assert (residual == segments).mean() >= 0.999
    assert all(len(np.unique(column)) > 16 for column in residual.T)
    expected = said.audio_values.mean(dim=1)[0].numpy()
    codes = np.concatenate([ours[:, :1], segments], axis=1) if model.config.normalize else segments
    # The loudness of 64 steps is 0.8 dB off at the most.
    np.testing.assert_allclose(mine.decode(codes), expected, rtol=0.1 if model.config.normalize else 1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dac"}, "model_type is 'dac'"),
        ({"kernel_size": 5}, "kernel_size is 5; only models with 7"),
        ({"codebook_dim": 8}, "codebook_dim is 8; only models with 16"),
        ({"trim_right_ratio": 0.5}, "trim_right_ratio is 0.5"),
        ({"chunk_length_s": 0.0101}, "segments of 242 samples are no whole number of frames of 40"),
    ],
)
def test_a_hugging_face_model_that_braid_cannot_run_is_refused(
    model_24khz: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = {"model_type": "encodec", "hidden_size": 16, "sampling_rate": 24_000} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {
        name.replace(".model.", ".layers.").replace(".conv.conv.", ".conv."): tensor.clone()
        for name, tensor in model_24khz.state_dict().items()
    }
    names = {
        name.replace("quantizer.vq.", "quantizer.").replace("._codebook", ".codebook"): t for name, t in names.items()
    }
    save_file(names, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, tmp_path / "mine")
