"""Train an image tokenizer on a folder of pictures.

    braid tokenizer train image --data FOLDER --out DIR --minutes 9 --seed 0

Enters: any pictures, at any depth. Leaves: a tokenizer folder (see `checkpoint`), with losses.jsonl and samples.png
beside it. Always holds: within the time box, which counts everything from the first line on, there is a checkpoint.

Two stretches, in shares of the run: first without a codebook, long enough that shape and colour are both in the latents,
because a codebook placed by k-means holds only what it finds there; then with it. No discriminator follows: on drawings
it cost fidelity and drew hues that were not there.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.tokenizers.checkpoint import resolve, write_checkpoint
from pipelines.tokenizers.codebook import MovingCodebook
from pipelines.tokenizers.image_card import write_card
from pipelines.tokenizers.image_data import Batches, read_pictures
from pipelines.tokenizers.image_losses import reconstruction_loss
from pipelines.tokenizers.image_start import start_as_pyramid
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizer, ImageTokenizerConfig, TowerConfig

DRAWINGS = ImageTokenizerConfig(
    # The encoder is the lighter one: it runs on every picture of a corpus, the decoder on those that someone looks at.
    encoder=TowerConfig(ch=32, ch_mult=(1, 2, 3, 4), num_res_blocks=1),
    decoder=TowerConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=2),
    z_channels=32,
    embed_dim=8,
    codebook_size=1024,
    resolution=128,
    norm_groups=4,
)
"""The architecture of the shipped tokenizer `drawings`: 4.5 M parameters, 16 x 16 codes for 128 x 128 pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageTrainingOptions:
    """Everything that a training run is told."""

    data: Path
    """Folder of pictures."""
    out: Path
    """Where the tokenizer goes; its last part becomes the tokenizer's name."""
    minutes: float = 9.0
    """Time box from the call of `train` to its return."""
    reserve_s: float = 30.0
    """Of the time box, kept for the last checkpoint and its evaluation."""
    steps: int | None = None
    """Stop after so many steps, if the time box does not come first. The schedule then counts steps, not time."""
    seed: int = 0
    batch_size: int = 128
    lr: float = 1e-3
    continuous_until: float = 0.4
    """Share of the run without a codebook."""
    init: Path | None = None
    """Continue from this tokenizer: architecture and weights."""
    config: ImageTokenizerConfig = DRAWINGS
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = torch.cuda.is_available()
    log_every: int = 50
    save_every_s: float = 90.0
    data_name: str = ""
    """What the pictures are, for the card."""
    data_licence: str = ""


@dataclass
class Clock:
    """How far the run is, in shares of it, by steps if their number is given, else by time."""

    minutes: float
    reserve_s: float
    steps: int | None
    started: float = field(default_factory=time.monotonic)
    first_step: float | None = None
    """When training proper began; reading and compiling are no part of the schedule."""

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """In [0, 1]; 1 means stop."""
        end = self.minutes * 60 - self.reserve_s
        if self.elapsed_s() >= end:
            return 1.0
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        if self.first_step is None:
            return 0.0
        return min((self.elapsed_s() - self.first_step) / max(end - self.first_step, 1e-9), 1.0)


class ImageTrainer:
    """The network being trained, its moving average, and what one step does to them."""

    RESTART_UNTIL = 0.85
    """Share of the run after which dead codes no longer start again, so that the codebook settles."""

    def __init__(self, options: ImageTrainingOptions) -> None:
        self.options = options
        self.device = torch.device(options.device)
        if options.init is None:
            self.config, self.model = options.config, VQGAN(options.config)
            start_as_pyramid(self.model)
        else:
            self.config = (given := ImageTokenizer.load(options.init)).config
            self.model = given.model.requires_grad_(True)
        self.model = self.model.train().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # The codebook moves by averages, not by gradients.
        self.model.quantize.requires_grad_(False)
        self.codebook = MovingCodebook(self.model.quantize.embedding.weight)
        self.quantized = options.init is not None
        self.spread = torch.ones((), device=self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4, fused=self.device.type == "cuda",
        )  # fmt: skip
        wrap: Callable[..., Any] = torch.compile if options.compile else lambda function: function
        self.latents = wrap(self.model.latents)
        self.images = wrap(self.model.images)
        self.reconstruction_loss = wrap(reconstruction_loss)

    def start_codebook(self, batches: Batches) -> None:
        """Place the codes where the encoder's outputs are."""
        wanted = 64 * self.config.codebook_size
        found: list[Tensor] = []
        while sum(map(len, found)) < wanted:
            found.append(_flat(self._encode(batches.next()).detach()))
        latents = torch.cat(found)[:wanted]
        self.codebook.initialize(latents)
        # Nothing held the latents' scale so far; the commitment is weighed relative to it.
        self.spread = latents.var(dim=0).mean()
        self.quantized = True

    def step(self, images: Tensor, step: int, lr: float, *, restart: bool) -> dict[str, Tensor]:
        """One step on images [B, 3, R, R]; returns detached scalars."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logged = self._backward(images, restart=restart)
        logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._follow(step)
        return logged

    def save(self, folder: Path) -> Path:
        """Write the averaged network as a tokenizer, in float16: half the size, and no visible difference."""
        return write_checkpoint(folder, self.config.to_json(), self.average.state_dict(), torch.float16)

    def _backward(self, images: Tensor, *, restart: bool) -> dict[str, Tensor]:
        latents = self._encode(images)
        if self.quantized:
            embedded, distance, (_, _, codes) = self.model.quantize(latents)
            commitment = distance / self.spread
            self.codebook.update(_flat(latents.detach()), codes.flatten(), restart=restart)
        else:
            embedded, commitment = latents, torch.zeros((), device=self.device)
        loss = self.reconstruction_loss(images, self._decode(embedded))
        (loss + commitment).backward()
        return {"loss": loss.detach(), "commitment": commitment.detach()}

    def _encode(self, images: Tensor) -> Tensor:
        with self._autocast():
            latents: Tensor = self.latents(images)
        return latents.float()

    def _decode(self, embedded: Tensor) -> Tensor:
        with self._autocast():
            # One memory layout in both stretches, or the second would be compiled anew.
            images: Tensor = self.images(embedded.contiguous(memory_format=torch.channels_last))
        return images

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        share = 1 - min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), share)
        # The codebook is an average already, and must fit restarted codes at once.
        self.average.quantize.embedding.weight.copy_(self.model.quantize.embedding.weight)


def train(options: ImageTrainingOptions) -> Path:
    """Train, evaluate on held-out pictures, and write the tokenizer with its card to `options.out`.

    Returns:
        `options.out`.

    Raises:
        MediaError: too few pictures.
        FloatingPointError: the loss is no longer finite; the last good checkpoint stays.
    """
    clock = Clock(options.minutes, options.reserve_s, options.steps)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    trainer = ImageTrainer(options)
    pictures = read_pictures(options.data, trainer.config.resolution)
    batches = Batches(pictures, options.batch_size, trainer.device, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{len(pictures.whole)} pictures, {len(pictures.held_out)} held out, {len(pictures.refused)} refused",
        flush=True,
    )

    saved_at, step, seen_at = clock.elapsed_s(), 0, 0.0
    with (options.out / "losses.jsonl").open("w", encoding="utf-8") as log:
        while (progress := clock.progress(step)) < 1:
            if not trainer.quantized and progress >= options.continuous_until:
                trainer.start_codebook(batches)
            lr = learning_rate(options, progress, step)
            restart = progress < trainer.RESTART_UNTIL and step % 10 == 0
            logged = trainer.step(batches.next(), step, lr, restart=restart)
            step += 1
            if clock.first_step is None:
                logged["loss"].item()
                clock.first_step = seen_at = clock.elapsed_s()
                print(f"first step after {clock.first_step:.1f} s", flush=True)
            if step % options.log_every == 0:
                values = {name: round(float(value), 5) for name, value in logged.items()}
                if not math.isfinite(values["loss"]):
                    raise FloatingPointError(f"loss {values['loss']} at step {step}; try a lower lr than {options.lr}.")
                rate = options.log_every * options.batch_size / max(clock.elapsed_s() - seen_at, 1e-9)
                seen_at = clock.elapsed_s()
                entry = {
                    "step": step,
                    "elapsed_s": round(seen_at, 1),
                    "lr": lr,
                    "pictures_per_s": round(rate),
                    **values,
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if step % (10 * options.log_every) == 0:
                    print(f"{progress:4.0%} " + " ".join(f"{k}={v:.4g}" for k, v in entry.items()), flush=True)
            if clock.elapsed_s() - saved_at > options.save_every_s:
                trainer.save(options.out)
                saved_at = clock.elapsed_s()
    trainer.save(options.out)
    print(f"saved after {clock.elapsed_s():.1f} s and {step} steps", flush=True)
    made = {
        "steps": step,
        "batch_size": options.batch_size,
        "trained_s": round(clock.elapsed_s()),
        "seed": options.seed,
        "init": options.init.name if options.init else None,
    }
    data = options.data_name or options.data.name
    write_card(options.out, trainer.device, pictures, data, options.data_licence, made)
    print(f"done after {clock.elapsed_s():.1f} s", flush=True)
    return options.out


def learning_rate(options: ImageTrainingOptions, progress: float, step: int) -> float:
    """Cosine over the run, from `options.lr` to a fiftieth of it, with a warmup by steps."""
    planned = math.inf if options.steps is None else options.steps
    warmup = min((step + 1) / min(200, planned / 10), 1.0)
    return options.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _flat(latents: Tensor) -> Tensor:
    """[B, E, R, C] to [N, E]."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


_HELP = {
    "data": "folder of pictures, read recursively",
    "out": "the tokenizer's folder; its last part is its name",
    "minutes": "time box, from start to end",
    "reserve_s": "of it, kept for the last checkpoint and its evaluation",
    "steps": "stop after so many steps, if the time box does not come first",
    "seed": "for weights, order and variation",
    "batch_size": "pictures a step",
    "lr": "learning rate at its highest",
    "continuous_until": "share of the run without a codebook",
    "init": "continue from this tokenizer (name or folder)",
    "config": "a config.json, for another shape than that of drawings",
    "device": "cuda, cuda:1, cpu",
    "compile": "compile the network",
    "log_every": "steps between lines of the log",
    "save_every_s": "seconds between checkpoints",
    "data_name": "what the pictures are, for the card",
    "data_licence": "their licence, for the card",
}


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module; every option is a field of `ImageTrainingOptions`."""
    parser = argparse.ArgumentParser(
        prog="braid tokenizer train image",
        description="Train a VQGAN, evaluate it on held-out pictures, and write it with its card.",
    )
    kinds: dict[str, Callable[[str], Any]] = {}
    kinds |= {
        "init": resolve,
        "steps": int,
        "seed": int,
        "batch_size": int,
        "log_every": int,
    }
    kinds |= dict.fromkeys(("device", "data_name", "data_licence"), str)
    for option in fields(ImageTrainingOptions):
        flag, told = "--" + option.name.replace("_", "-"), _HELP[option.name]
        if option.name == "compile":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=told)
        elif option.name in ("data", "out"):
            parser.add_argument(flag, type=Path, required=True, help=told)
        else:
            kind = _read_config if option.name == "config" else kinds.get(option.name, float)
            # A whole architecture as a default would fill the screen.
            shown = told if option.name == "config" or not option.default else f"{told} (default: %(default)s)"
            parser.add_argument(flag, type=kind, default=option.default, help=shown)
    train(ImageTrainingOptions(**vars(parser.parse_args(arguments))))


def _read_config(path: str) -> ImageTokenizerConfig:
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return ImageTokenizerConfig.from_json({k: v for k, v in values.items() if k != "kind"})


if __name__ == "__main__":
    main()
