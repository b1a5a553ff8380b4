"""What every section decodes, and the roof that it is held against.

A model of random weights, bfloat16 on a GPU, and a prompt of picture codes that more of them follow. The roof of a token is
the time to read what must be read once, at the bandwidth that a copy reaches in the same run: the weights of all blocks
and of the head, and the keys and values held, on average over the tokens that are timed. All sides have heads of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.records import SIZES, device, median_ms, peak_gib, record, records
from model import KeyValueCache, UnifiedTransformer, UnifiedTransformerConfig

Say = Callable[..., None]
"""(what, **values): one record."""

SMALL: dict[str, Any] = {
    "hidden_size": 128, "num_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 256, "text_vocab_size": 50,
    "image_vocab_size": 300, "audio_vocab_size": 50, "max_sequence_length": 64, "device": "cpu",
}  # fmt: skip
"""A model that outputs are compared on, in float64."""


def speaker(arguments: argparse.Namespace, section: str) -> Say:
    return lambda what, **values: record(arguments.out, section, what, **values)


def bandwidth(arguments: argparse.Namespace) -> float:
    """Bytes a second, read and written ones together, of a copy; measured by the first section that asks."""
    for found in records(arguments.out):
        if found["what"] == "copy":
            return found["tb_per_s"] * 1e12
    size = 1 << (20 if arguments.quick else 30)
    source = torch.randn(size, dtype=torch.bfloat16, device=device())
    target = torch.empty_like(source)
    speed = 4 * size / median_ms(lambda: target.copy_(source), 10) * 1e3
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record(arguments.out, "copy", "copy", tb_per_s=speed / 1e12, torch=torch.__version__, hardware=hardware)
    return speed


def config_for(arguments: argparse.Namespace) -> UnifiedTransformerConfig:
    length = slots_for(arguments)
    return UnifiedTransformerConfig.from_dict(SIZES[arguments.size] | {"max_sequence_length": max(length, 256)})


def slots_for(arguments: argparse.Namespace) -> int:
    """Of a cache: prompt, continuation, and some for warming up."""
    return arguments.prompt + arguments.tokens + 8


def random_model(config: UnifiedTransformerConfig) -> UnifiedTransformer:
    """On the device, bfloat16 on a GPU and float32 elsewhere."""
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = model.to(dtype).to_empty(device=device())
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    return model.eval()


def prompts(arguments: argparse.Namespace, config: UnifiedTransformerConfig, rows: int) -> tuple[Tensor, Tensor]:
    """Picture codes and their modality ids, int64 [rows, prompt]."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(config.image_vocab_size, (rows, arguments.prompt), generator=generator).to(device())
    return ids, torch.ones_like(ids)


def cache_for(model: UnifiedTransformer, rows: int, slots: int) -> KeyValueCache:
    weight = model.final_norm.weight
    return KeyValueCache(model.config, rows, slots, weight.device, weight.dtype)


def drawn(logits: Tensor) -> Tensor:
    """Ids by their probabilities at temperature 1, [B, V] to [B]: noise and the largest, without waiting for the device."""
    return (logits.float() - torch.empty_like(logits, dtype=torch.float32).exponential_().log()).argmax(-1)


def bytes_read(config: UnifiedTransformerConfig, rows: int, held: float, itemsize: int) -> dict[str, float]:
    """By a token of so many rows that hold so many tokens each, by what is read."""
    D, F, L = config.hidden_size, config.ffn_hidden_size, config.num_layers
    return {
        "weights": L * (4 * D * D + 2 * D * F + 2 * D) * itemsize,
        "head": D * config.image_vocab_size * itemsize,
        "attention": 2 * L * rows * held * D * itemsize,
    }


def tell(say: Say, arguments: argparse.Namespace, what: str, *, rows: int, ms: float, tokens: int, **more: Any) -> None:
    """The record of one way to decode: `ms` a token, on average over the first `tokens` after the prompt."""
    kind = 2 if device().type == "cuda" else 4
    read = bytes_read(config_for(arguments), rows, arguments.prompt + tokens / 2, kind)
    roof = sum(read.values()) / bandwidth(arguments) * 1e3
    say(
        what, rows=rows, ms=round(ms, 3), roof_ms=round(roof, 3), share_of_roof=round(roof / ms, 3),
        tokens_per_s=round(1e3 * rows / ms, 1), tokens=tokens, **more, peak_gib=peak_gib(),
    )  # fmt: skip
