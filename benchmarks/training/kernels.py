"""Attention and matrix products alone."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.packed_workload import make_steps
from benchmarks.training.records import config_of, device, median_ms, record
from model import UnifiedTransformerConfig
from model.attention import BACKENDS, AttentionPlan, attend


def time_attention(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Forward and backward of one backend, alone, on a micro-batch of the workload."""
    name = option["backend"]
    config = config_of(arguments)
    N, H = config.num_attention_heads, config.head_size
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    if reason := BACKENDS[name].unavailable(device(), dtype, H):
        record(arguments.out, "attention", name, skipped=reason)
        return
    if name == "sdpa" and not arguments.quick:
        record(arguments.out, "attention", name, skipped="a mask of 4096 x 4096 a row is no contender")
        return
    batch = make_steps(config, steps=1, sequences=4, micro_batch=4, length=arguments.length)[0].micro_batches[0]
    batch = batch.to(device())
    B, T = batch.token_ids.shape
    q, k, v = (torch.randn(B, T, 3, N, H, device=device(), dtype=dtype)).unbind(2)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    plan = AttentionPlan(
        backend=name, positions=batch.positions, rotation=None, cu_seqlens=batch.cu_seqlens, max_seqlen=T
    )
    if name == "sdpa":
        from model.attention import plan_attention

        sdpa = config_of(arguments, attention_backend="sdpa")
        plan = plan_attention(sdpa, torch.empty(B, T, 1, device=device(), dtype=dtype), cu_seqlens=batch.cu_seqlens)
    grad = torch.randn(B, T, N, H, device=device(), dtype=dtype)
    began = time.perf_counter()
    out = attend(q, k, v, plan)
    torch.autograd.grad(out, (q, k, v), grad)
    if device().type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    with torch.no_grad():
        forward = median_ms(lambda: attend(q, k, v, plan), 20)
    both = median_ms(lambda: torch.autograd.grad(attend(q, k, v, plan), (q, k, v), grad), 20)
    # Executed under the causal mask inside documents: 4 N H L^2 / 2 forward, 2.5 times that backward.
    work = 2 * N * H * float((batch.cu_seqlens.double().diff() ** 2).sum())
    record(
        arguments.out, "attention", name, first_call_s=round(first, 1), tokens=B * T,
        forward_ms=round(forward, 3), backward_ms=round(both - forward, 3), both_ms=round(both, 3),
        forward_tflops=round(work / forward / 1e9), backward_tflops=round(2.5 * work / (both - forward) / 1e9),
    )  # fmt: skip


def time_products(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Each product of a block, forward, input gradient, weight gradient in bfloat16 and added in float32."""
    from model import products

    config = config_of(arguments)
    if device().type == "cuda":
        a = torch.empty(1 << 30, dtype=torch.bfloat16, device=device())
        b = torch.empty_like(a)
        ms = median_ms(lambda: b.copy_(a), 10)
        record(arguments.out, "matmul", "copy", tb_per_s=round(2 * a.numel() * 2 / ms / 1e9, 2))
        del a, b
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    libraries = ["cublas", "cublaslt"] if device().type == "cuda" else ["cpu"]
    for library in libraries:
        if device().type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)
        for rows in (2, 4) if not arguments.quick else (1,):
            T = rows * arguments.length
            for name, (M, K) in weights_of(config).items():
                x = torch.randn(T, K, device=device(), dtype=dtype)
                w = torch.randn(M, K, device=device(), dtype=dtype) * 0.02
                g = torch.randn(T, M, device=device(), dtype=dtype)
                total = torch.zeros(M, K, device=device())
                calls: dict[str, Callable[[], object]] = {
                    "forward": lambda x=x, w=w: products.product(x, w),
                    "input gradient": lambda g=g, w=w: products.input_gradient(g, w),
                    "weight gradient": lambda g=g, x=x: g.T @ x,
                    "weight gradient, float32": lambda g=g, x=x, total=total: products.add_product_(total, g.T, x),
                }
                if device().type == "cuda":
                    calls |= float8_products(x, w, g)
                rates = {}
                for what, call in calls.items():
                    with contextlib.suppress(RuntimeError):
                        rates[what] = round(2 * T * M * K / median_ms(call, 8) / 1e9)
                record(arguments.out, "matmul", name, library=library, tokens=T, tflops=rates)


def weights_of(config: UnifiedTransformerConfig) -> dict[str, tuple[int, int]]:
    """The weights of a block, [M, K] each."""
    D, F = config.hidden_size, config.ffn_hidden_size
    return {"qkv": (3 * D, D), "attention output": (D, D), "ffn input": (F, D), "ffn output": (D, F)}


def float8_products(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], object]]:
    """The products as the model makes them, rounding included, and the bare product in both ways of summing."""
    from model import float8
    from model.elementwise import largest

    peaks = float8.Peaks.of(w)
    known = peaks._replace(x=largest(x))
    (a, a_scale), (b, b_scale) = float8.quantize(x, float8.E4M3), float8.quantize(w, float8.E4M3)
    calls: dict[str, Callable[[], object]] = {
        "float8 forward": lambda: float8.product(x, w, peaks),
        "float8 forward, both measured": lambda: float8.product(x, w, known),
        "float8 input gradient": lambda: float8.input_gradient(g, w, peaks),
    }
    for fast in (True, False):
        calls[f"float8 bare, fast {fast}"] = lambda fast=fast: float8._scaled_product(
            a, a_scale, b, b_scale, torch.bfloat16, fast
        )
    return calls
