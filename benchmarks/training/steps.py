"""Whole optimizer steps of the workload, timed."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from itertools import pairwise
from typing import Any

import torch

from benchmarks.packed_workload import executed_flops, make_steps
from benchmarks.training.breakdown import profile
from benchmarks.training.records import (
    PEAK,
    between,
    config_of,
    device,
    guarded,
    mean_losses,
    peak_gib,
    record,
    rows_of,
    synchronize,
)
from benchmarks.training.trainer import fastest_attention, largest_micro_batch, train_step, trainer


def time_steps(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Whole optimizer steps of the goal's workload, then a profile of some micro-batches."""
    backend = fastest_attention(arguments)
    config = config_of(arguments, attention_backend=backend, block_backend="fused", loss_chunk_tokens=4096)
    say = lambda what, **values: record(arguments.out, "step", what, **values)  # noqa: E731
    with trainer(config, keep=arguments.keep, precision=arguments.precision, tune=arguments.tune) as run:
        micro = largest_micro_batch(arguments, config, run, say)
        if not micro:
            return
        steps = make_steps(
            config, steps=arguments.steps, sequences=rows_of(arguments), micro_batch=micro, length=arguments.length,
            pin=device().type == "cuda",
        )  # fmt: skip
        samples = start_sampling()
        synchronize()
        began = time.perf_counter()
        results = [train_step(run, step) for step in steps]
        synchronize()
        wall = time.perf_counter() - began
        sampled = stop_sampling(samples)
        parts = [[between(a, b) for a, b in pairwise(r["marks"])] for _, r in results]
        seconds = [sum(part) / 1e3 for part in parts]
        tokens = [step.tokens for step in steps]
        speed = statistics.median(t / s for t, s in zip(tokens, seconds, strict=True))
        executed = statistics.median(executed_flops(config, s) / t for s, t in zip(steps, seconds, strict=True))
        say(
            "tokens/s", tokens_per_s=round(speed), micro_batch=micro, keep=arguments.keep, precision=arguments.precision,
            tune=arguments.tune, masters=run.masters, moments=run.moments, attention=run.model.attention_backend,
            blocks=run.model.block_backend, seconds_a_step=[round(s, 3) for s in seconds], wall_s=round(wall, 2),
            padding_share=round(1 - sum(tokens) / (len(steps) * rows_of(arguments) * arguments.length), 4),
            mfu_full=round(speed * config.flops_per_token(arguments.length) / PEAK, 4),
            mfu_causal=round(speed * config.flops_per_token(arguments.length, "causal") / PEAK, 4),
            executed_tflops=round(executed / 1e12, 1),
            phases_ms=phases_of(parts),
            peak_gib=peak_gib(), losses=[mean_losses(losses) for losses, _ in results],
            gradient_norm=[round(float(r["norm"]), 3) for _, r in results], gpu=sampled,
        )  # fmt: skip
        with guarded(say, "breakdown"):
            profile(run, config, steps[-1], say)


def phases_of(parts: list[list[float]]) -> dict[str, float]:
    """Median milliseconds of each phase of a step."""
    medians = [round(statistics.median(times), 1) for times in zip(*parts, strict=True)]
    return dict(zip(("forward_backward", "clip", "optimizer"), medians, strict=True))


def start_sampling() -> subprocess.Popen[str] | None:
    """Clock and power of the GPU, twice a second; reading only."""
    if device().type != "cuda":
        return None
    query = [
        "nvidia-smi",
        # Else it tells of all GPUs of the host.
        f"--id=GPU-{torch.cuda.get_device_properties(device()).uuid}",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "--format=csv,noheader,nounits",
        "-lms",
        "500",
    ]
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def stop_sampling(process: subprocess.Popen[str] | None) -> dict[str, float] | None:
    if process is None:
        return None
    process.terminate()
    rows = [line.split(",") for line in (process.communicate()[0] or "").splitlines() if line.count(",") == 2]
    if len(rows) < 4:
        return None
    numbers = [statistics.median(float(row[i]) for row in rows[1:]) for i in range(3)]
    return dict(zip(("clock_mhz", "power_w", "temperature_c"), numbers, strict=True))
