"""What all sections share: the sizes, the clock, and records that go to the screen and into a file."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import MODALITIES, UnifiedTransformerConfig

PEAK = 989e12
"""bf16, dense, of an H100 or H200 by datasheet."""


SIZES: dict[str, dict[str, Any]] = {
    "8b": {},
    "1b": {"hidden_size": 2048, "num_layers": 20, "num_attention_heads": 16, "ffn_hidden_size": 8192},
    "small": {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "ffn_hidden_size": 3072},
    "30m": {"hidden_size": 512, "num_layers": 8, "num_attention_heads": 4, "ffn_hidden_size": 2048}
    | {"text_vocab_size": 4096, "image_vocab_size": 4096, "audio_vocab_size": 1024},
    "quick": {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 128}
    | {"text_vocab_size": 199, "image_vocab_size": 96, "audio_vocab_size": 48},
}


def record(out: Path, section: str, what: str, **values: Any) -> None:
    """One result, to the screen and to the file."""
    line = json.dumps({"section": section, "what": what, **values})
    print(line, flush=True)
    with out.open("a") as file:
        file.write(line + "\n")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error_of(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float(
        (found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm().clamp(min=1e-30)
    )


def median_ms(run: Callable[[], object], repeat: int, warm: int = 2) -> float:
    """Median milliseconds of a call, by events where there is a GPU."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeat):
        if device().type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


@contextlib.contextmanager
def guarded(say: Callable[..., None], what: str) -> Iterator[None]:
    """An error is a record, and what follows still runs."""
    try:
        yield
    except Exception as error:
        say(what, error=f"{type(error).__name__}: {str(error)[:700]}")


def config_of(arguments: argparse.Namespace, **changes: Any) -> UnifiedTransformerConfig:
    values = SIZES[arguments.size] | {"max_sequence_length": max(arguments.length, 256)} | changes
    return UnifiedTransformerConfig(**values)


def rows_of(arguments: argparse.Namespace) -> int:
    """Rows of an optimizer step: 262,144 tokens."""
    return 4 if arguments.quick else 262144 // arguments.length


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def mean_losses(losses: Any) -> dict[str, float]:
    sums, counts = losses.sums.tolist(), losses.counts.tolist()
    return {name: round(s / max(1, n), 4) for name, s, n in zip(MODALITIES, sums, counts, strict=True)}


def mark() -> Any:
    if device().type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Any, last: Any) -> float:
    """Milliseconds."""
    return first.elapsed_time(last) if device().type == "cuda" else 1e3 * (last - first)


def synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
