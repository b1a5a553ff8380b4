"""Where a micro-batch goes: milliseconds by kind of kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

from benchmarks.packed_workload import Step
from benchmarks.training.records import between, device, synchronize
from benchmarks.training.trainer import train_step

KINDS = {
    "attention": ("flash", "fmha", "attn"),
    "loss": ("softmax_loss",),
    "optimizer": ("adamw",),
    "matmul": ("gemm", "nvjet", "xmma", "cublas", "cutlass"),
    "elementwise": ("norm_kernel", "norm_backward", "gelu", "rotate"),
    "copy": ("memcpy", "memset", "copy"),
    "reduction": ("reduce",),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(run: SimpleNamespace, step: Step, say: Callable[..., None]) -> None:
    """Milliseconds of one micro-batch, forward and backward, and of the optimizer, by kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    one = Step(step.micro_batches[:1], step.tokens)
    train_step(run, one)
    synchronize()
    activities = [ProfilerActivity.CUDA] if device().type == "cuda" else [ProfilerActivity.CPU]
    began = time.perf_counter()
    with profiler(activities=activities) as found:
        _, result = train_step(run, one)
        synchronize()
    wall = 1e3 * (time.perf_counter() - began)
    times: dict[str, float] = {}
    kernels: list[tuple[str, float, int]] = []
    for event in found.key_averages():
        ms = (event.self_device_time_total if device().type == "cuda" else event.self_cpu_time_total) / 1e3
        if ms:
            times[kind_of(event.key)] = times.get(kind_of(event.key), 0.0) + ms
            kernels.append((event.key[:90], round(ms, 3), event.count))
    marks = result["marks"]
    phases = [round(between(a, b), 2) for a, b in pairwise(marks)]
    say(
        "breakdown", tokens=one.micro_batches[0].token_ids.numel(), phases_ms=phases, profiled_wall_ms=round(wall, 1),
        ms={kind: round(ms, 2) for kind, ms in sorted(times.items(), key=lambda item: -item[1])},
        sum_ms=round(sum(times.values()), 2), gaps_ms=round(between(marks[0], marks[-1]) - sum(times.values()), 2),
    )  # fmt: skip
    for name, ms, count in sorted(kernels, key=lambda kernel: -kernel[1])[:28]:
        say("kernel", name=name, ms=ms, count=count, kind=kind_of(name))
