"""Each product of a block by every kernel that cuBLASLt names, beside the one that torch takes."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.training.kernels import weights_of
from benchmarks.training.records import config_of, device, error_of, record
from model.cublaslt import ROUNDS, TURN_MS, CublasLt, Layout, Product, timed
from model.products import add_product_

_SETS = 3
"""Operands in turn, so that none is still in the L2 cache from its last product."""

Operands = list[tuple[Tensor, Tensor, Tensor]]


def tune_products(arguments: argparse.Namespace, option: dict[str, object]) -> None:
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
            "forward": [(torch.empty_like(c), a, b.T) for a, b, c in zip(x, w, g, strict=True)],
            "input gradient": [(torch.empty_like(c), a, b) for a, b, c in zip(g, w, x, strict=True)],
            "weight gradient": [(c, a.T, b) for a, b, c in zip(g, x, sums, strict=True)],
        }
        for what, operands in products.items():
            tune(arguments, library, f"{name}, {what}", operands, add=what == "weight gradient")


def tune(arguments: argparse.Namespace, library: CublasLt, what: str, operands: Operands, add: bool) -> None:
    """Record the rates of torch's kernel, of the one that training would choose, and of all, short and sustained."""
    by_torch: Product = add_product_ if add else lambda out, left, right: torch.mm(left, right, out=out)
    out, left, right = operands[0]
    layout = Layout.of(out, left, right, add)
    assert layout is not None, "contiguous matrices of even sizes"
    kernels = library.kernels(layout)
    results = [_result(product, operands[0]) for product in (by_torch, *kernels)]
    work = 2 * layout.rows * layout.inner * layout.columns
    short = timed([by_torch, *kernels], operands, rounds=3, turn_ms=5)
    long = timed([by_torch, *kernels], operands, ROUNDS, TURN_MS)
    chosen = min(range(len(long)), key=long.__getitem__)
    rates = [
        {"short": round(work / one / 1e9), "sustained": round(work / other / 1e9)}
        for one, other in zip(short, long, strict=True)
    ]
    record(
        arguments.out, "tune", what, tokens=layout.inner if add else layout.rows, torch_tflops=rates[0],
        chosen_tflops=rates[chosen], gain=round(long[0] / long[chosen], 3), kernels_tflops=rates[1:],
        error=max(error_of(each, results[0].double()) for each in results[1:]),
    )  # fmt: skip


def _result(product: Product, operands: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    out, left, right = operands
    product(out.zero_(), left, right)
    return out[:64].cpu()


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)
