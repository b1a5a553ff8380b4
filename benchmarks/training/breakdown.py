"""Where a step goes: milliseconds by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

from benchmarks.packed_workload import Step, attention_flops, executed_flops
from benchmarks.training.records import between, device, synchronize
from benchmarks.training.trainer import train_step
from model import UnifiedTransformerConfig

KINDS = {
    "attention": ("flash", "fmha", "attn"),
    "loss": ("softmax_loss",),
    "optimizer": ("adamw",),
    "clip and zero": ("multi_tensor",),
    "matmul": ("gemm", "nvjet", "xmma", "cublas", "cutlass"),
    "elementwise": ("norm_kernel", "norm_backward", "gelu", "rotate"),
    "copy": ("memcpy", "memset", "copy"),
    "reduction": ("reduce",),
}

ONCE_A_STEP = ("optimizer", "clip and zero")
PROFILED = 8
"""Micro-batches: attention of one differs from another's by a third, with the documents in it."""


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(run: SimpleNamespace, config: UnifiedTransformerConfig, step: Step, say: Callable[..., None]) -> None:
    """Milliseconds of a micro-batch, the mean of some in a running step, and of what a step does once, by kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    count = min(PROFILED, len(step.micro_batches))
    some = Step(step.micro_batches[:count], step.tokens)
    # Hot, as in a run.
    train_step(run, some)
    activities = [ProfilerActivity.CUDA] if device().type == "cuda" else [ProfilerActivity.CPU]
    with profiler(activities=activities) as found:
        _, result = train_step(run, some)
        synchronize()
    each: dict[str, float] = {}
    once: dict[str, float] = {}
    kernels: list[tuple[str, float, int]] = []
    for event in found.key_averages():
        ms = (event.self_device_time_total if device().type == "cuda" else event.self_cpu_time_total) / 1e3
        if ms:
            kind = kind_of(event.key)
            times, share = (once, 1) if kind in ONCE_A_STEP else (each, count)
            times[kind] = times.get(kind, 0.0) + ms / share
            kernels.append((event.key[:90], round(ms / share, 3), event.count // share))
    forward_backward, *rest = (between(a, b) for a, b in pairwise(result["marks"]))
    attention = attention_flops(config, some) / count
    flops = {"matmul": executed_flops(config, some) / count - attention, "attention": attention}
    say(
        "breakdown", micro_batches=count, tokens=some.micro_batches[0].token_ids.numel(),
        micro_batch_ms=round(forward_backward / count, 2), ms=rounded(each),
        gaps_ms=round(forward_backward / count - sum(each.values()), 2),
        tflops={kind: round(f / each[kind] / 1e9) for kind, f in flops.items() if kind in each},
        gflop_a_token={kind: round(f / some.micro_batches[0].token_ids.numel() / 1e9, 3) for kind, f in flops.items()},
        once_a_step_ms=rounded(once), clip_and_optimizer_ms=[round(ms, 2) for ms in rest],
    )  # fmt: skip
    for name, ms, times_run in sorted(kernels, key=lambda kernel: -kernel[1])[:28]:
        say("kernel", name=name, ms=ms, count=times_run, kind=kind_of(name))


def rounded(times: dict[str, float]) -> dict[str, float]:
    return {kind: round(ms, 2) for kind, ms in sorted(times.items(), key=lambda item: -item[1])}
