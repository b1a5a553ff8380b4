"""Where a token's time goes, and how fast each product of a block can be."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.decoding.workload import (
    bandwidth,
    bytes_read,
    cache_for,
    config_for,
    drawn,
    prompts,
    random_model,
    slots_for,
    speaker,
)
from benchmarks.training.records import device, median_ms, synchronize
from model.decode import DecodingStep, step_unavailable

PRODUCTS = ("qkv", "output", "wide", "narrow")
"""Of a block, in the order in which they run."""

KINDS = {
    "attention": ("_attend", "attention", "flash", "fmha"),
    "weights": ("_product_kernel", "gemm", "nvjet", "cutlass", "splitk", "addmm", "aten::mm", "gemv"),
    "norm": ("_norm_kernel", "layer_norm"),
    "embedding": ("_embed_kernel", "embedding"),
    "gelu": ("gelu",),
}
"""What is none of these chooses the token: noise, logarithms, the largest."""


class Kernel(NamedTuple):
    name: str
    began_us: float
    ended_us: float


def kind_of(name: str) -> str:
    """Group of a kernel's name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "choosing")


def profile(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Milliseconds of a token by group of kernels, each beside the time to read what it reads."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    say, rows, steps = speaker(arguments, "profile"), option.get("rows", 1), 8
    model = random_model(config_for(arguments))
    cache = cache_for(model, rows, slots_for(arguments))
    ids, kinds = prompts(arguments, model.config, rows)
    model.prefill(ids, kinds, cache)
    reason = step_unavailable(model, cache)
    step = None if reason else DecodingStep(model, cache)
    token, kind = ids[:, 0].contiguous(), kinds[:, 0].contiguous()

    def one() -> None:
        hidden = model.decode_step(token, kind, cache) if step is None else step(token, kind)
        token.copy_(drawn(model.image_logits(hidden)))

    for _ in range(3):
        one()
    synchronize()
    gpu = device().type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            one()
        synchronize()
    kernels = kernels_of(found, gpu)
    spent: dict[str, float] = defaultdict(float)
    for name, ms in grouped(kernels, model.config.num_layers * len(PRODUCTS)).items():
        spent[name] = ms / steps
    wall = (max(k.ended_us for k in kernels) - min(k.began_us for k in kernels)) / 1e3 / steps
    covered = busy_ms(kernels) / steps
    speed = bandwidth(arguments)
    read = bytes_read(model.config, rows, arguments.prompt + 3 + steps / 2, 2 if gpu else 4)
    say(
        "token", rows=rows, way="eager: " + reason if reason else "captured", steps=steps, kernels=len(kernels) / steps,
        wall_ms=round(wall, 3), busy_ms=round(covered, 3), gaps_ms=round(wall - covered, 3),
        sum_ms=round(sum(spent.values()), 3),
        ms={name: round(ms, 4) for name, ms in sorted(spent.items(), key=lambda item: -item[1])},
        roof_ms={name: round(size / speed * 1e3, 4) for name, size in read.items()},
        note="kernels that start while the one before ends overlap, so the sum may exceed what is busy",
    )  # fmt: skip
    for line in slowest(kernels, steps):
        say("kernel", **line)


def kernels_of(found: Any, gpu: bool) -> list[Kernel]:
    """What ran, in order; on a CPU the operators, each without those that it calls."""
    wanted = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    kernels = []
    for event in found.events():
        if event.device_type == wanted:
            began, ended = event.time_range.start, event.time_range.end
            kernels.append(Kernel(event.name, began, ended if gpu else began + event.self_cpu_time_total))
    return sorted(kernels, key=lambda kernel: kernel.began_us)


def grouped(kernels: list[Kernel], products_a_step: int) -> dict[str, float]:
    """Milliseconds by group; the products of a block by name where each token has as many as there should be, and the
    head's apart."""
    spent: dict[str, float] = defaultdict(float)
    own = [k for k in kernels if "_product_kernel" in k.name]
    named = len(own) > 0 and len(own) % products_a_step == 0
    for index, kernel in enumerate(own):
        spent[PRODUCTS[index % len(PRODUCTS)] if named else "weights"] += kernel.ended_us - kernel.began_us
    for kernel in kernels:
        if "_product_kernel" not in kernel.name:
            kind = kind_of(kernel.name)
            spent["head" if named and kind == "weights" else kind] += kernel.ended_us - kernel.began_us
    return {name: us / 1e3 for name, us in spent.items()}


def busy_ms(kernels: list[Kernel]) -> float:
    """Time in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.ended_us - max(until, kernel.began_us))
        until = max(until, kernel.ended_us)
    return total / 1e3


def slowest(kernels: list[Kernel], steps: int) -> list[dict[str, Any]]:
    """The twelve names that take longest."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append((kernel.ended_us - kernel.began_us) / 1e3)
    order = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [
        {"name": name[:90], "ms": round(sum(ms) / steps, 4), "a_token": len(ms) / steps, "kind": kind_of(name)}
        for name, ms in order[:12]
    ]


def sweep(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """GB/s of each product of a block for several cuts, each layer's own weights in turn so that no cache helps."""
    say = speaker(arguments, "sweep")
    if device().type != "cuda":
        say("sweep", skipped="it needs a CUDA device")
        return
    from model import triton_decode
    from model.triton_decode import Tiles

    model, speed = random_model(config_for(arguments)), bandwidth(arguments)
    cuts = [
        (m, k, w, s) for m, k in ((2, 2048), (4, 1024), (8, 512), (8, 1024), (16, 512)) for w in (4, 8) for s in (1, 4)
    ]
    places = (("attention", "qkv"), ("attention", "output"), ("feed_forward", "input"), ("feed_forward", "output"))
    for name, (part, matrix) in zip(PRODUCTS, places, strict=True):
        weights = [getattr(getattr(block, part), matrix).weight for block in model.blocks]
        M, K = weights[0].shape
        x = torch.randn(1, K, device=device(), dtype=weights[0].dtype)
        y, scale = x.new_empty(1, M), torch.ones_like(x[0]) if name in ("qkv", "wide") else None

        def every(
            cut: Tiles, weights: list[Any] = weights, x: Any = x, y: Any = y, scale: Any = scale, name: str = name
        ) -> None:
            for weight in weights:
                triton_decode.product(x, weight, y, cut, scale=scale, eps=1e-5, gelu=name == "wide")

        found = {str(cut): round(len(weights) * 2 * M * K / graphed_ms(every, Tiles(*cut)) / 1e6) for cut in cuts}
        best = sorted(found.items(), key=lambda item: -item[1])
        say(
            "sweep", product=name, gb_per_s=dict(best[:6]), worst=best[-1], share_of_copy=round(best[0][1] * 1e9 / speed, 3)
        )  # fmt: skip


def graphed_ms(run: Callable[[Any], None], cut: Any) -> float:
    run(cut)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(cut)
    return median_ms(graph.replay, 5)
