"""Each product of a block by every kernel that cuBLASLt offers, beside the one that torch takes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.cublaslt import CublasLt
from benchmarks.training.kernels import weights_of
from benchmarks.training.records import config_of, device, error_of, record

_SETS = 3
"""Operands in turn, so that none is still in the L2 cache from its last product."""
_FINALISTS = 4

Run = Callable[[Tensor, Tensor, Tensor], object]


def tune_products(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """The four weights of a block, forward, input gradient, weight gradient in float32, at the rows of `--micro`."""
    if device().type != "cuda":
        record(arguments.out, "tune", "products", skipped="cuBLASLt runs on CUDA")
        return
    library, config = CublasLt(), config_of(arguments)
    T = int(arguments.micro.split(",")[0]) * arguments.length
    for name, (M, K) in weights_of(config).items():
        x, w, g = ([_random(*shape) for _ in range(_SETS)] for shape in ((T, K), (M, K), (T, M)))
        sums = [torch.zeros(M, K, device=device()) for _ in range(_SETS)]
        products = {
            "forward": [(a, b.T, torch.empty_like(c)) for a, b, c in zip(x, w, g, strict=True)],
            "input gradient": [(a, b, torch.empty_like(c)) for a, b, c in zip(g, w, x, strict=True)],
            "weight gradient": [(a.T, b, c) for a, b, c in zip(g, x, sums, strict=True)],
        }
        for what, operands in products.items():
            tune(arguments, library, f"{name}, {what}", operands, add=what == "weight gradient")


def tune(
    arguments: argparse.Namespace,
    library: CublasLt,
    what: str,
    operands: Sequence[tuple[Tensor, Tensor, Tensor]],
    add: bool,
) -> None:
    """Record the rates of torch's kernel and of the best few, which are timed once more by turns."""
    from model.products import add_product_

    def by_torch(a: Tensor, b: Tensor, to: Tensor) -> None:
        if add:
            add_product_(to, a, b)
        else:
            torch.mm(a, b, out=to)

    a, b, to = operands[0]
    by_torch(a, b, to.zero_())
    right = to[:64].double().cpu()
    work = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    tried: list[tuple[float, dict[str, Any], Run]] = []
    for told, run in library.kernels(a, b, to, add):
        run(a, b, to.zero_())
        told["error"] = error_of(to[:64], right)
        tried.append((_ms(run, operands, 6), told, run))
    finalists = sorted(tried, key=lambda one: one[0])[:_FINALISTS]
    # By turns, for the clock moves with the temperature.
    rounds = [[_ms(run, operands, 12) for run in (by_torch, *(run for _, _, run in finalists))] for _ in range(3)]
    torch_ms, *ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    record(
        arguments.out, "tune", what, tokens=to.shape[0], kernels=len(tried),
        torch_tflops=round(work / torch_ms / 1e9), best_tflops=[round(work / each / 1e9) for each in ms],
        gain=round(torch_ms / min(ms), 3), kernel=[told for _, told, _ in finalists],
    )  # fmt: skip


def _ms(run: Run, operands: Sequence[tuple[Tensor, Tensor, Tensor]], count: int) -> float:
    """Milliseconds of one of many in a row: the host must not be what is timed, nor a clock that has had time to rise."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    turn = cycle(operands)
    run(*next(turn))
    first.record()
    for _ in range(count):
        run(*next(turn))
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)
