"""Speed under other settings, from fewer micro-batches."""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

from benchmarks.packed_workload import attention_flops, executed_flops, make_steps
from benchmarks.training.records import PEAK, between, config_of, device, peak_gib, record, rows_of, synchronize
from benchmarks.training.trainer import fastest_attention, largest_micro_batch, train_step, trainer

VARIANTS: list[dict[str, Any]] = [
    {"name": "float8", "precision": "float8"},
    {"name": "torch varlen attention", "attention": "varlen"},
    {"name": "micro-batch of 2 rows", "micro": "2"},
    {"name": "micro-batch of 2 rows, all kept", "micro": "2", "keep": "all"},
    {"name": "float8, micro-batch of 2 rows, all kept", "micro": "2", "keep": "all", "precision": "float8"},
    {"name": "float8, tuned", "precision": "float8", "tune": True},
    {"name": "feed_forward recomputed in every block", "recompute_every": 1, "recompute": "feed_forward"},
    {"name": "compiled plain blocks under FSDP2", "blocks": "torch", "compile": True, "micro": "1", "limit_s": 150},
    {"name": "length 8192", "length": 8192, "micro": "2,1"},
    # One row is twice what fits with nothing recomputed; a sixth of the work is done twice, and not counted below.
    {"name": "length 32768, every second block recomputed", "length": 32768, "micro": "1", "recompute_every": 2},
    {"name": "length 4096, every second block recomputed", "micro": "8", "recompute_every": 2},
    {"name": "1b", "size": "1b", "micro": "8,4"},
    {"name": "1b, length 32768", "size": "1b", "length": 32768, "micro": "1"},
]


def time_variant(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Speed from a few micro-batches; the optimizer's time counts once in 262,144 tokens."""
    for name in ("length", "size", "micro", "attention"):
        if name in option and not (arguments.quick and name in ("size", "length")):
            setattr(arguments, name, option[name])
    if arguments.quick and option.get("attention", "sdpa") != "sdpa":
        record(arguments.out, "variants", option["name"], skipped="there is no such backend here")
        return
    config = config_of(
        arguments, attention_backend=fastest_attention(arguments), block_backend=option.get("blocks", "fused"),
        loss_chunk_tokens=4096,
    )  # fmt: skip
    say = lambda what, **values: record(arguments.out, "variants", what, **values)  # noqa: E731
    passed = {
        key: option[key] for key in ("recompute_every", "recompute", "keep", "precision", "tune") if key in option
    }
    with trainer(config, compile_blocks=option.get("compile", False), **passed) as run:
        micro = largest_micro_batch(arguments, config, run, say)
        if not micro:
            return
        count = 2 if arguments.quick else max(3, 49152 // (micro * arguments.length))
        step = make_steps(
            config, steps=1, sequences=count * micro, micro_batch=micro, length=arguments.length,
            pin=device().type == "cuda",
        )[0]  # fmt: skip
        results = [train_step(run, step) for _ in range(2)]
        synchronize()
        marks = results[-1][1]["marks"]
        a_step = [between(a, b) for a, b in pairwise(marks)]
        # The padding of the few rows drawn is that of the many.
        whole = a_step[0] * rows_of(arguments) / (count * micro) + a_step[1] + a_step[2]
        speed = step.tokens * rows_of(arguments) / (count * micro) / whole * 1e3
        say(
            option["name"], tokens_per_s=round(speed), micro_batch=micro, attention=run.model.attention_backend,
            mfu_full=round(speed * config.flops_per_token(arguments.length) / PEAK, 4),
            mfu_causal=round(speed * config.flops_per_token(arguments.length, "causal") / PEAK, 4),
            executed_tflops=round(executed_flops(config, step) / a_step[0] / 1e9, 1),
            # What longer documents cost more: tokens/s x GFLOP a token stays the same if nothing else is slower.
            executed_gflop_a_token=round(executed_flops(config, step) / step.tokens / 1e9, 3),
            attention_gflop_a_token=round(attention_flops(config, step) / step.tokens / 1e9, 3),
            phases_ms=[round(ms, 1) for ms in a_step], peak_gib=peak_gib(),
        )  # fmt: skip
