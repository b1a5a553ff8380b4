"""Train an audio tokenizer within a time box.

    python -m pipelines.tokenizers.train_audio --data FOLDER --out DIR --minutes 9 --seed 0

`--data` is a folder of sounds (WAV, FLAC, OGG, Opus, MP3), a tar of them, or a cache written by `--cache FILE.safetensors`
(int16 samples: a machine that trains from it needs no sound decoder). A hash of each clip's relative path holds out about
4% of the clips; figures, pictures and sounds in the card come from those alone. `--init FOLDER` continues from an earlier
tokenizer. The result is a tokenizer's folder: config.json, weights.safetensors, card.md, card.json, samples.png, samples.wav.

The loop: crops of all training clips at random gains; encode, quantize, decode; spectral losses; from `--gan-from` of the
time on, a small discriminator. The learning rate follows the clock, so that the schedule ends when the time does.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from pipelines.tokenizers.audio_data import Sounds, Strip
from pipelines.tokenizers.audio_evaluation import evaluate, require_estoi, write_card, write_samples
from pipelines.tokenizers.audio_losses import (
    ReconstructionLoss,
    SpectralDiscriminator,
    adversarial_losses,
    discriminator_loss,
)
from pipelines.tokenizers.audio_quantizer import CodebookTrainer
from pipelines.tokenizers.checkpoint import read_config, read_weights, resolve
from pipelines.tokenizers.encodec import AudioTokenizer, AudioTokenizerConfig, EncodecNetwork

# Shapes: B batch, K codebooks, F frames.

SPEECH = AudioTokenizerConfig(
    sample_rate_hz=16_000, n_q=8, n_filters=16, ratios=(8, 5, 4, 2), dimension=64, n_residual_layers=3, lstm=2
)
"""The shipped tokenizer's architecture: 50 frames/s, 4.5 M parameters, over 40 times real time on one CPU core."""

WARMUP_STEPS = 200
PLAIN_STEPS = 200
"""Steps before there are codebooks: k-means is worth more on what an encoder has learned than on its random outputs."""
COMMITMENT = 0.25
LATENT_SIZE = 0.01
"""Weight of the latents' mean square before there are codebooks, lest they grow where nothing holds them."""
GRADIENT_CLIP = 1.0
EMA_DECAY = 0.998
GAIN_DB = (-12.0, 6.0)
ADVERSARIAL, FEATURE_MATCHING = 1.0, 3.0
REPORT_EVERY = 20
RESTART_UNTIL = 0.85
"""Share of the run after which dead codes stay dead: a restarted one would not settle any more."""


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
    crop_seconds: float = 1.28
    learning_rate: float = 8e-4
    gan_from: float = 0.55
    """Share of the time after which the discriminator joins; 1 leaves it out."""
    max_steps: int | None = None
    speech: str = ""
    """Prefix of the relative paths of speech, on which intelligibility is measured."""
    about: Path | None = None
    """A Markdown file for the card: where the data comes from, under which licence."""
    command: str = ""


class Codec(nn.Module):
    """An EnCodec network in training: bfloat16 where that is safe, weight normalization, codebooks that learn.

    Args:
        network: Plain weights; `finished` gives them back.
        mixed_precision: bfloat16 for all but the LSTMs, and the first and last layers.
    """

    def __init__(self, network: EncodecNetwork, *, mixed_precision: bool) -> None:
        super().__init__()
        self.network = network
        self.mixed_precision = mixed_precision
        for module in _convolutions(network):
            weight_norm(module)
        self.codebooks = CodebookTrainer(network)

    def encode(self, waveforms: Tensor) -> Tensor:
        """float32 [B, 1, samples] -> latents, float32 [B, D, F]."""
        return self._run(self.network.encoder.model, waveforms)  # type: ignore[arg-type]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, float32 [B, D, F] -> float32 [B, 1, samples]."""
        return self._run(self.network.decoder.model, latents)  # type: ignore[arg-type]

    def forward(self, waveforms: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct with `depths` codebooks for each clip: waveforms, commitment loss, counts [K, codebook_size]."""
        latents = self.encode(waveforms)
        if not self.codebooks.ready:
            return self.decode(latents), LATENT_SIZE * latents.square().mean(), latents.new_ones(1, 1)
        quantized, commitment, counts = self.codebooks.quantize(latents, depths)
        return self.decode(quantized), commitment, counts

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            # cuDNN has no bfloat16 LSTM everywhere; 8 bits of mantissa at either end would be audible as noise.
            exact = hasattr(layer, "lstm") or index == 0 or index >= len(layers) - 2
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed_precision and not exact):
                x = layer(x.float() if exact else x)
        return x

    def finished(self) -> EncodecNetwork:
        """The network with weight normalization folded into plain weights."""
        network = copy.deepcopy(self.network)
        for module in _convolutions(network):
            parametrize.remove_parametrizations(module, "weight")
        return network.float()


def _convolutions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]


class Average:
    """Exponential moving average of a codec's weights and codebooks: what is saved."""

    def __init__(self, codec: Codec) -> None:
        self.codec = copy.deepcopy(codec)
        self._pairs = (_tensors(self.codec), _tensors(codec))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the live codec; faster at first, when all is still changing."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._pairs[0], self._pairs[1], 1 - decay)


def _tensors(codec: Codec) -> list[Tensor]:
    return [*codec.network.parameters(), *(codebook.embed for codebook in codec.network.codebooks)]  # type: ignore[list-item]


def train(options: AudioTrainingOptions) -> Path:
    """Train, save, evaluate on held-out clips, and write the card.

    Returns:
        The tokenizer's folder, `options.out`.

    Raises:
        FileNotFoundError: no sounds.
        ImportError: pystoi, encodec or a sound decoder is missing; before anything else runs.
        FloatingPointError: the loss is not finite.
    """
    clock = _Clock(options.minutes)
    require_estoi()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    codec, continued = _codec(options, device)
    config = codec.network.config
    sounds = Sounds.read(options.data, config.sample_rate_hz, clock.say)
    if options.cache:
        sounds.save(options.cache)
    training, held_out = sounds.split()
    clock.say(f"{sounds.minutes:.1f} min of sound, {len(training)} clips to train on, {len(held_out)} held out")
    generator = torch.Generator(device).manual_seed(options.seed)
    strip = Strip(sounds, training, device, generator)

    length = round(options.crop_seconds * config.sample_rate_hz / config.hop) * config.hop
    if continued:
        codec.codebooks.adopt()
    average = Average(codec)
    steps = _fit(options, clock, codec, average, strip, length)

    if not codec.codebooks.ready:
        raise ValueError(
            f"{steps} steps are too few: codebooks begin at step {PLAIN_STEPS}. Give more time, or smaller batches."
        )
    tokenizer = AudioTokenizer(average.codec.finished(), name=options.out.name, sha256="")
    tokenizer.save(options.out, torch.float16)
    clock.say(f"saved {options.out} after {steps} steps")
    tokenizer = AudioTokenizer.load(options.out, device=device)
    speech = [path for path in held_out if path.startswith(options.speech)]
    figures = evaluate(tokenizer, sounds, speech)
    write_samples(tokenizer, sounds, speech, options.out)
    run = {
        "command": options.command,
        "data_minutes": round(sounds.minutes, 1),
        "training_clips": len(training),
        "held_out_clips": len(held_out),
        "steps": steps,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()},
    }
    about = options.about.read_text(encoding="utf-8") if options.about else ""
    write_card(options.out, tokenizer, figures, run, about)
    clock.say(json.dumps(figures["by_n_q"]))
    return options.out


def _codec(options: AudioTrainingOptions, device: torch.device) -> tuple[Codec, bool]:
    if options.init is None:
        network = EncodecNetwork(options.config)
        network.initialise()
    else:
        folder = resolve(options.init)
        network = EncodecNetwork(AudioTokenizerConfig.from_json(read_config(folder, "audio"), str(folder)))
        network.load_weights(read_weights(folder), str(folder))
    return Codec(network.to(device), mixed_precision=device.type == "cuda"), options.init is not None


@torch.no_grad()
def _initialise_codebooks(codec: Codec, strip: Strip, length: int) -> None:
    latents = torch.cat([codec.encode(strip.crops(64, length, GAIN_DB)) for _ in range(4)])
    codec.codebooks.initialise(latents)


def _fit(
    options: AudioTrainingOptions, clock: _Clock, codec: Codec, average: Average, strip: Strip, length: int
) -> int:
    device = strip.samples.device
    n_q = codec.network.config.n_q
    reconstruction = ReconstructionLoss(codec.network.config.sample_rate_hz).to(device)
    optimizer = torch.optim.AdamW(
        codec.network.parameters(), options.learning_rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=True
    )
    critic = _Critic(device, options.gan_from)
    step = 0
    while (progress := clock.progress(step, options.max_steps)) < 1.0:
        if step >= PLAIN_STEPS and not codec.codebooks.ready:
            _initialise_codebooks(codec, strip, length)
        _set_learning_rate(optimizer, options.learning_rate * _schedule(progress, step))
        codec.codebooks.restarts = progress < RESTART_UNTIL
        original = strip.crops(options.batch_size, length, GAIN_DB)
        decoded, commitment, counts = codec(original, _depths(options.batch_size, n_q, strip.generator))
        terms = {**reconstruction(original, decoded), "commitment": COMMITMENT * commitment}
        terms |= critic.judge(original, decoded, progress)

        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(codec.network.parameters(), GRADIENT_CLIP)
        optimizer.step()
        average.update(step)
        critic.learn(original, decoded.detach(), progress)
        step += 1
        if step % REPORT_EVERY == 0:
            # Reading the loss also waits for the device, and so keeps the clock honest.
            clock.report(step, progress, float(loss.detach()), terms, float(norm), counts)
    return step


def _depths(batch: int, n_q: int, generator: torch.Generator) -> Tensor:
    """Codebooks for each clip: all of them for 40%, half of them for 30%, any number for the rest. int64 [B]."""
    device = generator.device
    draw = torch.rand(batch, generator=generator, device=device)
    depths = torch.randint(1, n_q + 1, (batch,), generator=generator, device=device)
    depths = torch.where(draw < 0.7, max(1, n_q // 2), depths)
    return torch.where(draw < 0.4, n_q, depths)


def _schedule(progress: float, step: int) -> float:
    """Linear warmup by steps, then cosine by time, down to 2%."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Critic:
    """The discriminator and its optimizer; it learns a little before the codec listens to it."""

    LEAD, RAMP = 0.02, 0.05

    def __init__(self, device: torch.device, start: float) -> None:
        self.start = start
        self.network = SpectralDiscriminator().to(device) if start < 1 else None
        self.mixed = device.type == "cuda"
        if self.network:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.optimizer = torch.optim.AdamW(self.network.parameters(), 3e-4, betas=(0.8, 0.99), fused=True)

    def judge(self, original: Tensor, decoded: Tensor, progress: float) -> dict[str, Tensor]:
        """Loss terms for the codec; none before its time."""
        weight = min(1.0, (progress - self.start) / self.RAMP)
        if self.network is None or weight <= 0:
            return {}
        self.network.requires_grad_(False)
        with torch.autocast(original.device.type, torch.bfloat16, enabled=self.mixed):
            with torch.no_grad():
                real = self.network(original)
            fooling, matching = adversarial_losses(real, self.network(decoded))
        return {"adversarial": weight * ADVERSARIAL * fooling, "features": weight * FEATURE_MATCHING * matching}

    def learn(self, original: Tensor, decoded: Tensor, progress: float) -> None:
        """One step of the discriminator."""
        if self.network is None or progress < self.start - self.LEAD:
            return
        self.network.requires_grad_(True)
        with torch.autocast(original.device.type, torch.bfloat16, enabled=self.mixed):
            loss = discriminator_loss(self.network(original), self.network(decoded))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
        self.optimizer.step()


class _Clock:
    """Wall time since the start, and what is said with it."""

    def __init__(self, minutes: float) -> None:
        self.started, self.limit = time.monotonic(), minutes * 60
        self.training_since: float | None = None
        self.said = 0.0

    def progress(self, step: int, max_steps: int | None) -> float:
        """Share of the training that is over, by time or by steps, whichever ends first."""
        now = time.monotonic()
        if self.training_since is None:
            self.training_since = now
        left = self.started + self.limit - self.training_since
        by_time = (now - self.training_since) / left if left > 0 else 1.0
        return max(by_time, step / max_steps if max_steps is not None else 0.0)

    def report(
        self, step: int, progress: float, loss: float, terms: dict[str, Tensor], norm: float, counts: Tensor
    ) -> None:
        """Print a line every ten seconds.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step}: lower the learning rate, or start --gan-from later."
            )
        if time.monotonic() - self.said < 10:
            return
        self.said = time.monotonic()
        shares = counts / counts.sum(dim=1, keepdim=True)
        perplexity = torch.exp(-(shares * torch.log(shares.clamp_min(1e-9))).sum(dim=1)).round().int().tolist()
        parts = " ".join(f"{name} {float(term.detach()):.3f}" for name, term in terms.items())
        self.say(
            f"step {step} ({100 * progress:.0f}%) loss {loss:.3f}: {parts}; gradient {norm:.2f}; perplexity {perplexity}"
        )

    def say(self, message: str) -> None:
        """Print with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {message}", flush=True)


def options_from(arguments: list[str] | None = None) -> AudioTrainingOptions:
    """Read a command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    defaults = AudioTrainingOptions.__dataclass_fields__
    for name, kind, help_text in (
        ("minutes", float, "wall time until the last step, reading the data included"),
        ("seed", int, "for weights, crops and gains"),
        ("batch_size", int, "crops a step"),
        ("crop_seconds", float, "length of a crop"),
        ("learning_rate", float, "at its highest"),
        ("gan_from", float, "share of the time after which the discriminator joins; 1: never"),
        ("max_steps", int, "stop after this many steps, if time has not run out"),
        ("device", str, "cuda, cuda:1, cpu"),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=defaults[name].default, help=f"{help_text} (default: %(default)s)")
    return AudioTrainingOptions(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    import sys
    from dataclasses import replace

    train(replace(options_from(), command="python -m pipelines.tokenizers.train_audio " + " ".join(sys.argv[1:])))
