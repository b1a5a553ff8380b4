"""Train an audio tokenizer within a time box.

    braid tokenizer train audio --data FOLDER --out DIR --minutes 9 --seed 0

`--data` is a folder of sounds (WAV, FLAC, OGG, Opus, MP3), a tar of them, or a cache written by `--cache FILE.safetensors`
(int16 samples: a machine that trains from it needs no sound decoder). A hash of each clip's relative path holds out about
4% of the clips; figures, pictures and sounds in the card come from those alone. `--init FOLDER` continues from an earlier
tokenizer. The result is a tokenizer's folder: config.json, weights.safetensors, card.md, card.json, samples.png, samples.wav.

The loop: crops of all training clips at random gains; encode, quantize, decode; spectral losses. It has two stages. First an
autoencoder without codebooks, whose latents have unit power and bear noise about as strong as quantization will be: so it
learns to say much in few bits before it has to choose words. Then codebooks, set by k-means, that learn with the rest. The
learning rate follows the clock, so that the schedule ends when the time does. On a GPU a step is one CUDA graph.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.tokenizers.audio_codec import Average, Codec
from pipelines.tokenizers.audio_data import Sounds, Strip
from pipelines.tokenizers.audio_evaluation import continuous_estoi, evaluate, require_estoi, write_card, write_samples
from pipelines.tokenizers.audio_losses import ReconstructionLoss
from pipelines.tokenizers.checkpoint import read_config, read_weights, resolve
from pipelines.tokenizers.encodec import AudioTokenizer, AudioTokenizerConfig, EncodecNetwork
from pipelines.tokenizers.replay import Replay, side_stream

# Shapes: B batch, K codebooks, D latent dimension, F frames.

SPEECH = AudioTokenizerConfig(
    sample_rate_hz=16_000, n_q=8, n_filters=24, ratios=(8, 5, 4, 2), dimension=64, n_residual_layers=1, lstm=0
)
"""The shipped tokenizer's architecture: 50 frames/s, 4.0 M parameters, over 40 times real time on one CPU core.

No LSTM: it would be half of the parameters and most of the launches, for 7 frames of context that convolutions have too.
"""

WARMUP_STEPS = 200
CONTINUOUS_UNTIL = 0.45
"""Share of the run without codebooks: k-means is worth more on what an encoder has learned than on its random outputs."""
LATENT_NOISE = 0.4
"""RMS of the noise on latents of RMS 1: 64 dimensions then carry some 90 bits a frame, and 8 codebooks of 1024 carry 80."""
NOISE_RAMP = 0.15
"""Share of the run in which the noise grows to its full strength."""
SPECTRAL_RAMP = 0.1
"""Share of the run in which spectral terms grow to their full weight, after waveforms are followed."""
LATENT_POWER = 0.3
COMMITMENT = 0.25
GRADIENT_CLIP = 1.0
GAIN_DB = (-12.0, 6.0)
DEPTH_SHARES = (0.4, 0.3, 0.15, 0.15)
"""Shares of clips that use all, half, a quarter and an eighth of the codebooks."""
KMEANS_BATCHES = 12
RESTART_EVERY = 25
RESTART_UNTIL = 0.85
"""Share of the run after which dead codes stay dead: a restarted one would not settle any more."""
REPORT_EVERY = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioTrainingOptions:
    """What one training run is; the card repeats it."""

    data: Path
    out: Path
    minutes: float = 9.0
    """Wall time from start to the last step, reading the data included; evaluation comes after."""
    seed: int = 0
    config: AudioTokenizerConfig = field(default=SPEECH)
    """Ignored with `init`, whose own architecture continues."""
    init: Path | None = None
    cache: Path | None = None
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size: int = 64
    crop_seconds: float = 0.96
    learning_rate: float = 1e-3
    max_steps: int | None = None
    cuda_graph: bool = True
    """On a GPU, replay the step as one graph."""
    speech: str = ""
    """Prefix of the relative paths of speech, on which intelligibility is measured."""
    about: Path | None = None
    """A Markdown file for the card: where the data comes from, under which licence."""
    command: str = ""


def train(options: AudioTrainingOptions) -> Path:
    """Train, save, evaluate on held-out clips, and write the card.

    Returns:
        The tokenizer's folder, `options.out`.

    Raises:
        FileNotFoundError: no sounds.
        ImportError: pystoi, encodec or a sound decoder is missing; before anything else runs.
        FloatingPointError: the loss is not finite.
    """
    clock = _Clock(options.minutes, options.max_steps)
    require_estoi()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    codec, continued = _codec(options, device)
    config = codec.network.config
    sounds = Sounds.read(options.data, config.sample_rate_hz, clock.say)
    if options.cache:
        sounds.save(options.cache)
    training, held_out = sounds.split()
    speech = [path for path in held_out if path.startswith(options.speech)]
    clock.say(f"{sounds.minutes:.1f} min of sound, {len(training)} clips to train on, {len(held_out)} held out")
    length = round(options.crop_seconds * config.sample_rate_hz / config.hop) * config.hop
    strip = Strip(sounds, training, length, device, options.seed)

    with side_stream(device), _timed_convolutions():
        trainer = _Trainer(options, clock, codec, strip)
        if continued:
            codec.codebooks.adopt()
        else:
            trainer.fit_continuous()
            reached, clips = continuous_estoi(codec, sounds, speech)
            clock.say(f"without codebooks: ESTOI {reached:.3f} over {clips} held-out clips")
            trainer.start_codebooks()
        trainer.fit_quantized()

    tokenizer = AudioTokenizer(trainer.average.codec.finished(), name=options.out.name, sha256="")
    tokenizer.save(options.out, torch.float16)
    clock.say(f"saved {options.out} after {trainer.step} steps")
    tokenizer = AudioTokenizer.load(options.out, device=device)
    figures = evaluate(tokenizer, sounds, speech)
    write_samples(tokenizer, sounds, speech, options.out)
    run = {
        "command": options.command,
        "data_minutes": round(sounds.minutes, 1),
        "training_clips": len(training),
        "held_out_clips": len(held_out),
        "steps": trainer.step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
    }
    about = options.about.read_text(encoding="utf-8") if options.about else ""
    write_card(options.out, tokenizer, figures, run, about)
    clock.say(json.dumps(figures["by_n_q"]))
    return options.out


@contextlib.contextmanager
def _timed_convolutions() -> Iterator[None]:
    """Let cuDNN choose algorithms by timing, among few candidates: shapes never change, but timing takes seconds too."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = False, 10


def _codec(options: AudioTrainingOptions, device: torch.device) -> tuple[Codec, bool]:
    if options.init is None:
        network = EncodecNetwork(options.config)
        network.initialise()
    else:
        folder = resolve(options.init)
        network = EncodecNetwork(AudioTokenizerConfig.from_json(read_config(folder, "audio"), str(folder)))
        network.load_weights(read_weights(folder), str(folder))
    return Codec(network.to(device), mixed_precision=device.type == "cuda"), options.init is not None


class _Draws:
    """All that is random in a step, drawn outside of it: a captured step must find it at the same place."""

    def __init__(self, strip: Strip, batch: int, latent_shape: tuple[int, int], seed: int) -> None:
        device = strip.samples.device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.last_start = strip.starts
        self.starts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.gain_db = torch.zeros(batch, device=device)
        self.depth = torch.zeros(batch, device=device)
        """Uniform in [0, 1): decides how many codebooks a clip uses."""
        self.noise = torch.zeros(batch, *latent_shape, device=device)

    def renew(self) -> None:
        """Draw anew, in place."""
        self.starts.random_(0, self.last_start, generator=self.generator)
        self.gain_db.uniform_(*GAIN_DB, generator=self.generator)
        self.depth.uniform_(generator=self.generator)
        self.noise.normal_(generator=self.generator)


class _Outputs(NamedTuple):
    """What a step leaves on the device, to be read now and then."""

    values: Tensor
    """The loss terms, then the gradient's norm before clipping."""
    counts: Tensor
    residuals: Tensor


class _Trainer:
    """Both stages of the training: their steps, and the loop around them."""

    def __init__(self, options: AudioTrainingOptions, clock: _Clock, codec: Codec, strip: Strip) -> None:
        device, config = strip.samples.device, codec.network.config
        self.options, self.clock, self.codec, self.strip = options, clock, codec, strip
        self.graphs = options.cuda_graph and device.type == "cuda"
        self.draws = _Draws(
            strip, options.batch_size, (config.dimension, len(strip.within) // config.hop), options.seed
        )
        self.loss = ReconstructionLoss(config.sample_rate_hz).to(device)
        self.rate = torch.zeros((), device=device)
        self.noise_level = torch.zeros((), device=device)
        self.depths = torch.tensor([max(1, config.n_q >> halvings) for halvings in range(4)], device=device)
        self.depth_edges = torch.tensor(np.cumsum(DEPTH_SHARES)[:-1], dtype=torch.float32, device=device)
        self.optimizer = torch.optim.AdamW(
            codec.network.parameters(),
            self.rate,
            betas=(0.8, 0.99),
            weight_decay=1e-3,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.average = Average(codec)
        self.step = 0
        self.names: list[str] = []

    def fit_continuous(self) -> None:
        """Train without codebooks until their time comes."""
        step = Replay(self._continuous_step, enabled=self.graphs, say=self.clock.say)
        while (progress := self.clock.progress(self.step)) < CONTINUOUS_UNTIL:
            self.noise_level.fill_(LATENT_NOISE * min(1.0, progress / NOISE_RAMP))
            self.loss.set_spectral_share(max(0.03, min(1.0, progress / SPECTRAL_RAMP - 0.4)))
            self._advance(step, progress)
        self.loss.set_spectral_share(1.0)

    @torch.no_grad()
    def start_codebooks(self) -> None:
        """Set codebooks by k-means on latents of random crops."""
        batches = []
        for _ in range(KMEANS_BATCHES):
            self.draws.renew()
            batches.append(self.codec.encode(self._originals()))
        self.codec.codebooks.initialise(torch.cat(batches), self.draws.generator)
        self.clock.say("codebooks begin")

    def fit_quantized(self) -> None:
        """Train with codebooks until the end."""
        self.average.restart()
        step = Replay(self._quantized_step, enabled=self.graphs, say=self.clock.say)
        while (progress := self.clock.progress(self.step)) < 1.0:
            outputs = self._advance(step, progress)
            if self.step % RESTART_EVERY == 0 and progress < RESTART_UNTIL:
                self.codec.codebooks.restart(outputs.residuals, self.draws.generator)

    def _advance(self, step: Replay[_Outputs], progress: float) -> _Outputs:
        self.rate.fill_(self.options.learning_rate * _schedule(progress, self.step))
        self.draws.renew()
        outputs = step()
        self.step += 1
        if self.step % REPORT_EVERY == 0:
            # Reading the loss also waits for the device, and so keeps the clock honest.
            self.clock.report(self.step, progress, dict(zip(self.names, outputs.values.tolist(), strict=True)), outputs)
        return outputs

    def _originals(self) -> Tensor:
        return self.strip.crops(self.draws.starts, self.draws.gain_db)

    def _continuous_step(self) -> _Outputs:
        original = self._originals()
        latents = self.codec.encode(original)
        decoded = self.codec.decode(latents + self.noise_level * self.draws.noise)
        values = self._descend({**self.loss(original, decoded), "power": _power_loss(latents)})
        nothing = values.new_ones(1, 1)
        return _Outputs(values, nothing, nothing)

    def _quantized_step(self) -> _Outputs:
        original = self._originals()
        latents = self.codec.encode(original)
        depths = self.depths[torch.bucketize(self.draws.depth, self.depth_edges, right=True)]
        quantized = self.codec.codebooks.quantize(latents, depths)
        decoded = self.codec.decode(quantized.latents)
        terms = {**self.loss(original, decoded), "power": _power_loss(latents)}
        values = self._descend({**terms, "commitment": COMMITMENT * quantized.commitment})
        self.average.update()
        return _Outputs(values, quantized.counts, quantized.residuals)

    def _descend(self, terms: dict[str, Tensor]) -> Tensor:
        self.names = [*terms, "gradient"]
        values = torch.stack(list(terms.values()))
        self.optimizer.zero_grad(set_to_none=True)
        values.sum().backward()
        norm = nn.utils.clip_grad_norm_(self.codec.network.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        return torch.cat([values.detach(), norm.detach()[None]])


def _power_loss(latents: Tensor) -> Tensor:
    """Holds the latents' mean square at 1; how dimensions share it is theirs to find."""
    return LATENT_POWER * (latents.square().mean() - 1.0).square()


def _schedule(progress: float, step: int) -> float:
    """Linear warmup by steps, then constant while there are no codebooks, then a cosine by time, down to 2%."""
    late = max(0.0, progress - CONTINUOUS_UNTIL) / (1.0 - CONTINUOUS_UNTIL)
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


class _Clock:
    """Wall time since the start, and what is said with it."""

    def __init__(self, minutes: float, max_steps: int | None) -> None:
        self.started, self.limit, self.max_steps = time.monotonic(), minutes * 60, max_steps
        self.training_since: float | None = None
        self.said = 0.0

    def progress(self, step: int) -> float:
        """Share of the training that is over, by time or by steps, whichever ends first."""
        now = time.monotonic()
        if self.training_since is None:
            self.training_since = now
        left = self.started + self.limit - self.training_since
        by_time = (now - self.training_since) / left if left > 0 else 1.0
        return max(by_time, step / self.max_steps if self.max_steps is not None else 0.0)

    def report(self, step: int, progress: float, values: dict[str, float], outputs: _Outputs) -> None:
        """Print a line every ten seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        norm = values.pop("gradient")
        loss = sum(values.values())
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: lower the learning rate.")
        if time.monotonic() - self.said < 10:
            return
        self.said = time.monotonic()
        shares = outputs.counts / outputs.counts.sum(dim=1, keepdim=True)
        perplexity = torch.exp(-(shares * torch.log(shares.clamp_min(1e-9))).sum(dim=1)).round().int().tolist()
        parts = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.say(
            f"step {step} ({100 * progress:.0f}%) loss {loss:.3f}: {parts}; gradient {norm:.2f}; perplexity {perplexity}"
        )

    def say(self, message: str) -> None:
        """Print with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {message}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module; every option is a field of `AudioTrainingOptions`."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="braid tokenizer train audio",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder or tar of sounds, or a .safetensors cache of int16 samples"
    )
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer's folder; its last part is its name")
    parser.add_argument(
        "--cache", type=Path, help="also write the decoded sounds here (.safetensors), for --data elsewhere"
    )
    parser.add_argument("--init", type=Path, help="continue from this tokenizer (folder)")
    parser.add_argument("--about", type=Path, help="Markdown for the card: sources and licences of the data")
    parser.add_argument("--speech", default="", help="prefix of the paths of speech; the card measures these")
    parser.add_argument(
        "--no-cuda-graph", dest="cuda_graph", action="store_false", help="launch every operation of a step by itself"
    )
    defaults = AudioTrainingOptions.__dataclass_fields__
    for name, kind, help_text in (
        ("minutes", float, "wall time until the last step, reading the data included"),
        ("seed", int, "for weights, crops and gains"),
        ("batch_size", int, "crops a step"),
        ("crop_seconds", float, "length of a crop"),
        ("learning_rate", float, "at its highest"),
        ("max_steps", int, "stop after this many steps, if time has not run out"),
        ("device", str, "cuda, cuda:1, cpu"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=defaults[name].default, help=f"{help_text} (default: %(default)s)")
    options = AudioTrainingOptions(**vars(parser.parse_args(given)), command=f"{parser.prog} {' '.join(given)}")
    train(options)


if __name__ == "__main__":
    main()
