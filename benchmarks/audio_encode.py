"""Sound to codes, encoding alone, against the package's own loop: `python -m benchmarks.audio_encode --sounds PATH`.

Input: `--sounds`, a folder of sounds, or a `.npy` of int16 samples at 24 kHz; clips are cut from it at random places.
Weights: EnCodec's released file cannot be part of this repository, so its architecture (24 kHz, 8 codebooks of 1,024) gets
random ones of three kinds, and codebooks by k-means on its latents: "linear" nearly passes waveforms through; "kaiming"
is as nonlinear as its ELUs can make it; under "default", torch's own, latents hardly depend on the sound, and rounding
shows most. And the shipped `speech`, which is trained but has no LSTM.

On a GPU, theirs is the package's loop in batches of 64, float32 (and, for comparison, TF32 and float16 autocast); ours is the
fast encoder. Without one, both sides are float32 modules, and ours is the whole of `AudioTokenizer.encode`.
`--breakdown` prints where ours spends its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import close, medians, result
from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.audio_quantizer import CodebookTrainer
from pipelines.tokenizers.encodec import AudioDtype, AudioTokenizer
from pipelines.tokenizers.encodec_network import EncodecNetwork

if TYPE_CHECKING:
    from pipelines.tokenizers.encodec_fast import FastEncoder

RELEASED = AudioTokenizerConfig(sample_rate_hz=24_000, n_q=8, pad_mode="reflect")
"""The architecture of `encodec_24khz` at 6 kbps, weight normalization folded in."""
TINY = AudioTokenizerConfig(
    sample_rate_hz=24_000, n_q=4, codebook_size=64, n_filters=8, dimension=32, pad_mode="reflect"
)
WEIGHTS = ("linear", "kaiming", "default", "speech")
THEIR_CLIPS = 64
HOST_BATCHES = 4
"""Of ours, where sound comes from host memory: one is computed while the next is on its way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few short clips")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clips, arguments.seconds, arguments.repeat = 8, 2.0, 3
    sounds = read(arguments.sounds)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for name in arguments.weights:
        if name == "speech":
            tokenizer = AudioTokenizer.load("speech", device=device)
        else:
            tokenizer = random_tokenizer(TINY if arguments.quick else RELEASED, name, sounds, device)
        clips = cut(sounds, arguments.clips, arguments.seconds, tokenizer.hop, tokenizer.sample_rate_hz)
        compare = on_gpu if device.type == "cuda" else on_cpu
        results += compare(name, tokenizer, clips, arguments.repeat)
        if arguments.breakdown and device.type == "cuda":
            breakdown(name, tokenizer, clips)
    close(results)


def read(path: Path) -> np.ndarray:
    """All sounds in a row, float32 at 24 kHz."""
    if path.suffix == ".npy":
        return np.load(path).astype(np.float32) / 32767
    from pipelines.corpus.sounds import load_sound

    files = sorted(file for file in path.rglob("*") if file.suffix in (".wav", ".flac", ".ogg", ".mp3"))
    if not files:
        raise SystemExit(f"{path}: no sounds here; give a folder with WAV, FLAC, OGG or MP3 files.")
    return np.concatenate([load_sound(file.read_bytes(), str(file), RELEASED.sample_rate_hz) for file in files])


def cut(sounds: np.ndarray, clips: int, seconds: float, hop: int, sample_rate_hz: int) -> np.ndarray:
    """Clips of whole frames from random places, each at a random level down to -20 dB: float32 [clips, samples]."""
    generator = np.random.default_rng(0)
    times = np.arange(int(seconds * sample_rate_hz) // hop * hop) * (RELEASED.sample_rate_hz / sample_rate_hz)
    starts = generator.integers(0, len(sounds) - int(times[-1]) - 1, clips)
    gains = 10 ** generator.uniform(-1, 0, clips)
    places = np.arange(int(times[-1]) + 2)
    found = [
        gain * np.interp(times, places, sounds[start : start + len(places)])
        for start, gain in zip(starts, gains, strict=True)
    ]
    return np.stack(found).astype(np.float32)


@torch.no_grad()
def random_tokenizer(
    config: AudioTokenizerConfig, weights: str, sounds: np.ndarray, device: torch.device
) -> AudioTokenizer:
    """The architecture with random weights, and codebooks that fit what its encoder makes of sounds."""
    network = EncodecNetwork(config).to(device).eval()
    if weights == "linear":
        network.initialise()
    if weights == "kaiming":
        for module in network.encoder.modules():
            if isinstance(module, torch.nn.Conv1d):
                torch.nn.init.kaiming_normal_(module.weight)
    clips = torch.from_numpy(cut(sounds, 32, 4.0, config.hop, config.sample_rate_hz)).to(device)
    with exact():
        CodebookTrainer(network).initialise(torch.cat([network.encoder(part[:, None]) for part in clips.split(8)]))
    return AudioTokenizer(network, name=weights, sha256="", device=device)


def on_cpu(name: str, tokenizer: AudioTokenizer, clips: np.ndarray, repeat: int) -> list[dict[str, object]]:
    """Our `encode` against the network's, all clips in one batch; float32 both."""
    batch = torch.from_numpy(clips)[:, None]
    with torch.inference_mode():
        expected = tokenizer.network.encode(batch, tokenizer.n_q).transpose(1, 2).numpy()
        equal = shares(np.stack(tokenizer.encode(list(clips))), expected)
        seconds = medians(
            lambda: tokenizer.encode(list(clips)), lambda: tokenizer.network.encode(batch, tokenizer.n_q), repeat=repeat
        )
    ours, theirs = (clips.size / tokenizer.sample_rate_hz / median for median in seconds)
    checked = f"codes equal: {equal}; of theirs, a search in float64 finds {search_share(tokenizer, batch[:, 0])}"
    line = result(f"audio encode, weights {name}, CPU", ours, theirs, "audio-seconds/s", checked=checked)
    print(line)
    return [line]


@torch.inference_mode()
def on_gpu(name: str, tokenizer: AudioTokenizer, clips: np.ndarray, repeat: int) -> list[dict[str, object]]:
    """The fast encoders against the package's modules, on waveforms that lie on the device; then from host memory."""
    from pipelines.tokenizers.encodec_fast import FastEncoder

    waveforms = torch.from_numpy(clips).to(tokenizer.device)
    theirs: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: package(tokenizer, waveforms, exact()),
        "TF32": lambda: package(tokenizer, waveforms, tf32()),
        "float16 autocast": lambda: package(tokenizer, waveforms, torch.autocast("cuda", torch.float16)),
    }
    ours: dict[AudioDtype, Callable[[], Tensor]] = {}
    from_host: dict[AudioDtype, Callable[[], object]] = {}
    dtypes: tuple[AudioDtype, AudioDtype] = ("float16x2", "float16")
    for dtype in dtypes:
        encoder = FastEncoder(tokenizer.network, split=dtype == "float16x2", device=tokenizer.device)
        fast = AudioTokenizer(tokenizer.network, name=name, sha256="", device=tokenizer.device, dtype=dtype)
        ours[dtype] = partial(encoder.encode, waveforms, tokenizer.n_q)
        from_host[dtype] = partial(fast.encode, list(clips) * HOST_BATCHES)
    expected = theirs["float32"]().cpu().numpy()
    equal = {label: shares(side().cpu().numpy(), expected) for label, side in (theirs | ours).items()}
    audio = clips.size / tokenizer.sample_rate_hz
    rates = dict(zip(theirs | ours, waited_rates([*theirs.values(), *ours.values()], audio, repeat), strict=True))
    hosted = dict(zip(dtypes, waited_rates(list(from_host.values()), audio * HOST_BATCHES, 3), strict=True))
    results = []
    for dtype in dtypes:
        for other in theirs:
            checked = f"codes equal to the package's float32: ours {equal[dtype]}; theirs {equal[other]}"
            what = f"audio encode, weights {name}, {len(clips)} clips: {dtype} against the package's {other}"
            results.append(result(what, rates[dtype], rates[other], "audio-seconds/s", checked=checked))
        what = f"AudioTokenizer.encode from host memory, weights {name}: {dtype} against the package's float32 on the device"
        checked = f"codes equal to the package's float32: {equal[dtype]}"
        results.append(result(what, hosted[dtype], rates["float32"], "audio-seconds/s", checked=checked))
    for line in results:
        print(line, flush=True)
    print(
        f"weights {name}: of the package's float32 codes, a search in float64 finds {search_share(tokenizer, waveforms)}"
    )
    return results


def waited_rates(sides: list[Callable[[], object]], audio: float, repeat: int) -> list[float]:
    """Seconds of sound a second, of sides that each encode so much of it, until the device is done."""
    for side in sides:
        side()
    return [audio / median for median in medians(*(waited(side) for side in sides), repeat=repeat)]


def package(tokenizer: AudioTokenizer, waveforms: Tensor, precision: AbstractContextManager[object]) -> Tensor:
    """The package's own loop: [B, samples] -> codes [B, F, K]."""
    with precision:
        parts = [tokenizer.network.encode(part[:, None], tokenizer.n_q) for part in waveforms.split(THEIR_CLIPS)]
    return torch.cat(parts).transpose(1, 2)


@contextmanager
def exact() -> Iterator[None]:
    """float32 throughout."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """TF32 in convolutions, LSTM and matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@torch.inference_mode()
def search_share(tokenizer: AudioTokenizer, waveforms: Tensor) -> str:
    """Share of the package's codes that a search in float64 finds too, on the same latents, in percent."""
    quantizer: Any = tokenizer.network.quantizer
    equal = []
    for part in waveforms.split(THEIR_CLIPS):
        with exact():
            latents = tokenizer.network.encoder(part[:, None])
            codes = quantizer.vq.encode(latents, n_q=tokenizer.n_q)
        residual = latents.transpose(1, 2).flatten(0, 1).double()
        for layer, found in zip(quantizer.vq.layers, codes.flatten(1), strict=False):
            entries = layer.codebook.double()
            nearest = torch.cdist(residual, entries).argmin(dim=1)
            equal.append((nearest == found).double().mean().item())
            residual -= entries[nearest]
    return f"{100 * np.mean(equal):.2f}%"


def waited(side: Callable[[], object]) -> Callable[[], None]:
    """The same, and until the device is done with it."""

    def run() -> None:
        side()
        torch.cuda.synchronize()

    return run


def shares(codes: np.ndarray, expected: np.ndarray) -> str:
    """Equal codes in percent, over all and by codebook, of [B, F, K] each."""
    same = codes == expected
    by_codebook = " ".join(f"{100 * share:.2f}" for share in same.mean(axis=(0, 1)))
    return f"{100 * same.mean():.3f}% ({by_codebook})"


@torch.inference_mode()
def breakdown(name: str, tokenizer: AudioTokenizer, clips: np.ndarray) -> None:
    """Print what each part of the fast encoders takes, in microseconds of the device for one second of sound."""
    from pipelines.tokenizers.encodec_fast import FastEncoder

    waveforms = torch.from_numpy(clips).to(tokenizer.device)
    for label, split in (("float16x2", True), ("float16", False)):
        encoder = FastEncoder(tokenizer.network, split=split, device=tokenizer.device)
        times = parts(encoder, waveforms, tokenizer.n_q, clips.shape[1] / tokenizer.sample_rate_hz)
        print(f"{name}, {label}, microseconds a second of sound, {sum(times.values()):.2f} in all:")
        print("  " + ", ".join(f"{part} {time:.2f}" for part, time in times.items()), flush=True)


def parts(encoder: FastEncoder, waveforms: Tensor, n_q: int, seconds: float) -> dict[str, float]:
    """Microseconds a second of sound of each part, for clips of so many seconds."""
    from pipelines.tokenizers.encodec_fast import FRONT_SAMPLES

    times = {}
    x = waveforms[: max(1, FRONT_SAMPLES // waveforms.shape[1])]
    audio = len(x) * seconds
    for stage, (unit, convolution) in enumerate(zip(encoder.units, encoder.strided, strict=True), 1):
        times[f"unit {stage}"] = on_device(partial(encoder.unit, unit, x)) / audio
        activated = encoder.unit(unit, x)
        steps = activated.shape[2] // convolution.stride
        x = torch.empty(len(x), steps, convolution.outputs, dtype=encoder.stored, device=x.device)
        run = partial(convolution.run, activated, x, reflect=encoder.reflect, split=encoder.split)
        times[f"strided {stage}"] = on_device(run) / audio
    clips, frames, audio = len(waveforms), x.shape[1], len(waveforms) * seconds
    latents = encoder.latents(waveforms)
    if encoder.recurrence:
        times["LSTM"] = on_device(partial(encoder.recurrence.run, clips, frames)) / audio
    times["quantizer"] = on_device(partial(encoder.codebooks.nearest, latents.flatten(0, 1), n_q)) / audio
    host = torch.empty(waveforms.shape, pin_memory=True)
    times["copy in"] = on_device(partial(torch.empty_like(waveforms).copy_, host, non_blocking=True)) / audio
    times["copy out"] = on_device(encoder.encode(waveforms, n_q).cpu) / audio
    return times


def on_device(side: Callable[[], object], repeat: int = 7) -> float:
    """Median microseconds of the device."""
    side()
    times = []
    for _ in range(repeat):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        side()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return 1e3 * float(np.median(times))


if __name__ == "__main__":
    main()
