"""The training step on the fixed workload: `python -m benchmarks.train_step`.

The reference configuration (7.60 B) on one GPU: packed documents (`packed_workload`), 262,144 tokens an optimizer step,
optimizer included. Each section runs in a process of its own with a time limit, so that one that fails takes no other
with it; its results are JSON lines, to the screen and to `--out`.

    check      the fused block, the heads' loss, attention and the optimizer against float64
    attention  milliseconds of each attention backend on the workload's documents
    matmul     TFLOP/s of each matrix product of a block
    step       tokens/s of whole optimizer steps, with a breakdown by kind of kernel
    variants   the same for other settings, from fewer micro-batches
    losses     loss curves of float32 and of leaner masters, gradients, moments and products, side by side
    peers      transformers' GPT-NeoX and plain PyTorch at the same dimensions

`--quick` runs all of it on tiny dimensions, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import close, result
from benchmarks.packed_workload import Step, executed_flops, make_steps
from model import MODALITIES, UnifiedTransformer, UnifiedTransformerConfig
from model.attention import BACKENDS, AttentionPlan, attend

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
LIMIT_S = {"check": 150, "attention": 100, "matmul": 50, "step": 210, "variants": 120, "losses": 120, "peers": 150}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sections", default="check,attention,step,matmul,variants,losses,peers")
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps of the section step")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro", default="4,3,2,1", help="rows of a micro-batch to try, until one fits")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of the sections check and attention")
    parser.add_argument("--variants", help="parts of the names of those to run, separated by commas; default all")
    parser.add_argument(
        "--attention", help="backend; the fastest that passed the sections check and attention by default"
    )
    parser.add_argument("--out", type=Path, default=Path("train_step.jsonl"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--option", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.length, arguments.steps, arguments.micro = "quick", 256, 2, "2"
    if arguments.run:
        run_section(arguments)
        return
    arguments.out.unlink(missing_ok=True)
    for section in arguments.sections.split(","):
        if section in ("check", "attention"):
            for backend in arguments.backends.split(","):
                start(section, arguments, {"backend": backend})
        elif section == "variants":
            wanted = (arguments.variants or "").split(",")
            for option in VARIANTS:
                if any(part in option["name"] for part in wanted):
                    start(section, arguments, option)
        elif section == "peers":
            for peer in PEERS:
                start(section, arguments, {"peer": peer})
        else:
            start(section, arguments, {})
    summary(arguments.out)


def start(section: str, arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Run a section in a process of its own; whatever happens to it is a record."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.train_step", "--run", section, "--option", json.dumps(option)]
    for name in ("size", "steps", "length", "micro", "out"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--quick"] if arguments.quick else []
    if arguments.attention:
        command += ["--attention", arguments.attention]
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        # flash-attn-4 compiles its kernels on first use: once for all sections.
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    }
    print(f"== {section} {option or ''}", flush=True)
    error = None
    try:
        done = subprocess.run(
            command, env=environment, timeout=option.get("limit_s", LIMIT_S[section]), stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            error = f"exit {done.returncode}: {done.stderr[-1500:]}"
    except subprocess.TimeoutExpired as expired:
        tail = expired.stderr.decode() if isinstance(expired.stderr, bytes) else expired.stderr or ""
        error = f"over its limit of {expired.timeout} s; {tail[-300:]}"
    record(arguments.out, section, "took", seconds=round(time.perf_counter() - began, 1), option=option, error=error)


def record(out: Path, section: str, what: str, **values: Any) -> None:
    """One result, to the screen and to the file."""
    line = json.dumps({"section": section, "what": what, **values})
    print(line, flush=True)
    with out.open("a") as file:
        file.write(line + "\n")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def run_section(arguments: argparse.Namespace) -> None:
    """What the process of one section does."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    sections: dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]] = {
        "check": check,
        "attention": time_attention,
        "matmul": time_products,
        "step": time_steps,
        "variants": time_variant,
        "losses": compare_losses,
        "peers": time_peer,
    }
    sections[arguments.run](arguments, json.loads(arguments.option))


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


# --- check ------------------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """One model in float64 on the CPU, and the same weights as they run here."""
    from pipelines.pretrain.master_adamw import MasterAdamW

    say = lambda what, **values: record(arguments.out, "check", what, **values)  # noqa: E731
    say("machine", torch=torch.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    sizes = {"hidden_size": 512, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 2048}
    sizes |= {"text_vocab_size": 5257, "image_vocab_size": 1024, "audio_vocab_size": 264, "z_loss_weight": 1e-3}
    if arguments.quick:
        sizes |= {"hidden_size": 64, "num_attention_heads": 2, "ffn_hidden_size": 128, "text_vocab_size": 157}
    config = UnifiedTransformerConfig(**sizes, max_sequence_length=512, device="cpu", loss_chunk_tokens=300)
    batch = make_steps(config, steps=1, sequences=2, micro_batch=2, length=512)[0].micro_batches[0]
    exact = UnifiedTransformer(config, seed=0).bfloat16().double()
    exact.loss(batch).total.backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    here = batch.to(device())
    dtype = torch.bfloat16
    name = option["backend"]
    if reason := BACKENDS[name].unavailable(device(), dtype, config.head_size):
        say(f"model with {name}", skipped=reason)
    else:
        for blocks in ("torch", "fused"):
            for accumulate in (False, True):
                with guarded(say, f"model with {name}, blocks {blocks}"):
                    settings = config.to_dict() | {"attention_backend": name, "block_backend": blocks}
                    model = UnifiedTransformer(UnifiedTransformerConfig.from_dict(settings), seed=0)
                    model = model.to(device(), dtype)
                    if accumulate:
                        MasterAdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, accumulate=True)
                    output = model.loss(here)
                    output.total.backward()
                    errors = {n: error_of(p.grad, expected[n]) for n, p in model.named_parameters()}
                    worst = max(errors, key=lambda n: errors[n])
                    kinds = {str(p.grad.dtype) for p in model.parameters()}
                    say(
                        f"model with {name}, blocks {blocks}, accumulate {accumulate}",
                        loss=float(output.total),
                        loss_error=abs(float(output.total) - float(exact.loss(batch).total)),
                        worst_gradient=[worst, errors[worst]],
                        median_gradient=statistics.median(errors.values()),
                        grads=sorted(kinds),
                    )
    if name != ("varlen" if device().type == "cuda" else "sdpa"):
        return
    with guarded(say, "float8"):
        check_float8(say, config, here, expected)
    with guarded(say, "optimizer"):
        check_optimizer(say)


def check_float8(
    say: Callable[..., None], config: UnifiedTransformerConfig, batch: Any, expected: dict[str, Any]
) -> None:
    """Gradients in float8 against the same reference: three to four bits, so errors of some percent are right."""
    from model import float8

    x = torch.randn(300, 1000, device=device()).bfloat16() * 3
    for turn in (False, True):
        cast, scale = float8.quantize(x, float8.E4M3, transpose=turn)
        plain = (x.float() / scale).clamp(-448, 448).to(float8.E4M3)
        differ = float(((plain.T if turn else plain).float() != cast.float()).float().mean())
        say(f"float8 cast, turned {turn}", share_that_differs=differ)
    attention = "varlen" if device().type == "cuda" else "sdpa"
    values = config.to_dict() | {"block_backend": "fused", "attention_backend": attention}
    model = UnifiedTransformer(UnifiedTransformerConfig.from_dict(values), seed=0).to(device(), torch.bfloat16)
    for block in model.blocks:
        block.float8 = True  # type: ignore[assignment]
    output = model.loss(batch)
    output.total.backward()
    errors = {n: error_of(p.grad, expected[n]) for n, p in model.named_parameters()}
    say(
        "float8",
        loss=float(output.total),
        median_gradient=statistics.median(errors.values()),
        worst=max(errors.values()),
    )


def check_optimizer(say: Callable[..., None]) -> None:
    from pipelines.pretrain.master_adamw import MasterAdamW

    weight = torch.nn.Parameter(torch.randn(300, 1000, device=device()).bfloat16())
    twin = torch.nn.Parameter(weight.detach().double().cpu())
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = MasterAdamW([weight], accumulate=True, **settings)
    theirs = torch.optim.AdamW([twin], **settings)
    for _ in range(10):
        gradient = torch.randn(300, 1000)
        weight.grad.copy_(gradient)  # type: ignore[union-attr]
        twin.grad = gradient.double()
        ours.step()
        theirs.step()
    moved = error_of(next(iter(ours.masters().values())), twin.detach())
    say("optimizer, 10 steps", master_error=moved, weight_error=error_of(weight.detach(), twin.detach()))


@contextlib.contextmanager
def guarded(say: Callable[..., None], what: str) -> Iterator[None]:
    """An error is a record, and what follows still runs."""
    try:
        yield
    except Exception as error:
        say(what, error=f"{type(error).__name__}: {str(error)[:700]}")


# --- attention, matmul ------------------------------------------------------------------------------------------------


def config_of(arguments: argparse.Namespace, **changes: Any) -> UnifiedTransformerConfig:
    values = SIZES[arguments.size] | {"max_sequence_length": max(arguments.length, 256)} | changes
    return UnifiedTransformerConfig(**values)


def rows_of(arguments: argparse.Namespace) -> int:
    """Rows of an optimizer step: 262,144 tokens."""
    return 4 if arguments.quick else 262144 // arguments.length


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
    D, F = config.hidden_size, config.ffn_hidden_size
    if device().type == "cuda":
        a = torch.empty(1 << 30, dtype=torch.bfloat16, device=device())
        b = torch.empty_like(a)
        ms = median_ms(lambda: b.copy_(a), 10)
        record(arguments.out, "matmul", "copy", tb_per_s=round(2 * a.numel() * 2 / ms / 1e9, 2))
        del a, b
    shapes = {"qkv": (3 * D, D), "attention output": (D, D), "ffn input": (F, D), "ffn output": (D, F)}
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    libraries = ["cublas", "cublaslt"] if device().type == "cuda" else ["cpu"]
    for library in libraries:
        if device().type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)
        for rows in (2, 4) if not arguments.quick else (1,):
            T = rows * arguments.length
            for name, (M, K) in shapes.items():
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


def float8_products(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], object]]:
    """The products as the model makes them, rounding included, and the bare product in both ways of summing."""
    from model import float8

    (a, a_scale), (b, b_scale) = float8.quantize(x, float8.E4M3), float8.quantize(w, float8.E4M3)
    calls: dict[str, Callable[[], object]] = {
        "float8 forward": lambda: float8.product(x, w),
        "float8 input gradient": lambda: float8.input_gradient(g, w),
    }
    for fast in (True, False):
        calls[f"float8 bare, fast {fast}"] = lambda fast=fast: float8._scaled_product(
            a, a_scale, b, b_scale, torch.bfloat16, fast
        )
    return calls


# --- step -------------------------------------------------------------------------------------------------------------


def fastest_attention(arguments: argparse.Namespace) -> str:
    """The backend asked for, or the fastest one that gave right gradients."""
    if arguments.attention:
        return str(arguments.attention)
    found = records(arguments.out)
    right = {
        r["what"].split(",")[0].removeprefix("model with ")
        for r in found
        if r["section"] == "check" and r.get("median_gradient", 1.0) < 0.05 and r["loss_error"] < 0.05
    }
    times = {r["what"]: r["both_ms"] for r in found if r["section"] == "attention" and "both_ms" in r}
    contenders = {name: ms for name, ms in times.items() if name in right}
    if not contenders and right:
        return next(name for name in BACKENDS if name in right)
    return (
        min(contenders, key=lambda name: contenders[name])
        if contenders
        else ("varlen" if device().type == "cuda" else "auto")
    )


@contextlib.contextmanager
def trainer(
    config: UnifiedTransformerConfig, *, masters: str = "optimizer", moments: str = "bf16", learning_rate: float = 3e-4,
    recompute_every: int = 0, recompute: str = "all", compile_blocks: bool = False, precision: str = "bf16",
) -> Iterator[SimpleNamespace]:  # fmt: skip
    """Model, optimizer and ranks as a pretraining run makes them."""
    from pipelines.pretrain.optimizer import make_optimizer
    from pipelines.pretrain.parallelize import build_model, join_ranks

    settings = SimpleNamespace(
        learning_rate=learning_rate, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, fused=True, moments=moments
    )
    with join_ranks("auto") as ranks:
        model = build_model(
            config, ranks, seed=0, precision=precision, masters=masters, recompute_every=recompute_every,
            recompute=recompute, compile_blocks=compile_blocks,
        )  # fmt: skip
        yield SimpleNamespace(model=model, ranks=ranks, optimizer=make_optimizer(model, settings))


def train_step(run: SimpleNamespace, step: Step) -> tuple[Any, dict[str, Any]]:
    """One optimizer step as `pipelines.pretrain.loop` takes it; losses, and events between its phases."""
    from pipelines.pretrain.by_dataset import Datasets
    from pipelines.pretrain.step import clip_gradients, forward_backward

    marks = [mark()]
    losses = forward_backward(run.model, step, {}, run.ranks, Datasets(["data"]))
    marks.append(mark())
    norm = clip_gradients(run.model, 1.0)
    marks.append(mark())
    run.optimizer.step()
    run.optimizer.zero_grad()
    marks.append(mark())
    return losses, {"marks": marks, "norm": norm}


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


def time_steps(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Whole optimizer steps of the goal's workload, then a profile of one micro-batch."""
    backend = fastest_attention(arguments)
    config = config_of(arguments, attention_backend=backend, block_backend="fused", loss_chunk_tokens=4096)
    say = lambda what, **values: record(arguments.out, "step", what, **values)  # noqa: E731
    with trainer(config) as run:
        micro, warm = largest_micro_batch(arguments, config, run, say)
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
            "tokens/s", tokens_per_s=round(speed), micro_batch=micro, attention=run.model.attention_backend,
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
            profile(run, warm, say)


def phases_of(parts: list[list[float]]) -> dict[str, float]:
    """Median milliseconds of each phase of a step."""
    medians = [round(statistics.median(times), 1) for times in zip(*parts, strict=True)]
    return dict(zip(("forward_backward", "clip", "optimizer"), medians, strict=True))


def largest_micro_batch(
    arguments: argparse.Namespace, config: UnifiedTransformerConfig, run: SimpleNamespace, say: Callable[..., None]
) -> tuple[int, Step | None]:
    """Rows of a micro-batch that fit, and a warmed-up step of two of them."""
    for micro in map(int, arguments.micro.split(",")):
        warm = make_steps(config, steps=1, sequences=2 * micro, micro_batch=micro, length=arguments.length, seed=9)[0]
        try:
            train_step(run, warm)
            synchronize()
            say("fits", micro_batch=micro, peak_gib=peak_gib())
            return micro, warm
        except torch.OutOfMemoryError as error:
            say("does not fit", micro_batch=micro, peak_gib=peak_gib(), error=str(error)[:160])
            message = None  # noqa: F841
        run.optimizer.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 0, None


def peak_gib() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def mean_losses(losses: Any) -> dict[str, float]:
    sums, counts = losses.sums.tolist(), losses.counts.tolist()
    return {name: round(s / max(1, n), 4) for name, s, n in zip(MODALITIES, sums, counts, strict=True)}


def start_sampling() -> subprocess.Popen[str] | None:
    """Clock and power of the GPU, twice a second; reading only."""
    if device().type != "cuda":
        return None
    query = [
        "nvidia-smi",
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


VARIANTS: list[dict[str, Any]] = [
    {"name": "float8", "precision": "float8"},
    {"name": "torch varlen attention", "attention": "varlen"},
    {"name": "micro-batch of 2 rows", "micro": "2"},
    {"name": "cublaslt", "library": "cublaslt"},
    {"name": "feed_forward recomputed in every block", "recompute_every": 1, "recompute": "feed_forward"},
    {"name": "compiled plain blocks under FSDP2", "blocks": "torch", "compile": True, "micro": "1", "limit_s": 150},
    {"name": "length 8192", "length": 8192, "micro": "2,1"},
    {"name": "length 32768", "length": 32768, "micro": "1"},
    {"name": "1b", "size": "1b", "micro": "8,4"},
]


def time_variant(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Speed from a few micro-batches; the optimizer's time counts once in 262,144 tokens."""
    for name in ("length", "size", "micro", "attention"):
        if name in option and not (arguments.quick and name in ("size", "length")):
            setattr(arguments, name, option[name])
    if arguments.quick and option.get("attention", "sdpa") != "sdpa":
        record(arguments.out, "variants", option["name"], skipped="there is no such backend here")
        return
    if "library" in option and device().type == "cuda":
        torch.backends.cuda.preferred_blas_library(option["library"])
    config = config_of(
        arguments, attention_backend=fastest_attention(arguments), block_backend=option.get("blocks", "fused"),
        loss_chunk_tokens=4096,
    )  # fmt: skip
    say = lambda what, **values: record(arguments.out, "variants", what, **values)  # noqa: E731
    passed = {key: option[key] for key in ("recompute_every", "recompute", "precision") if key in option}
    with trainer(config, compile_blocks=option.get("compile", False), **passed) as run:
        micro, _ = largest_micro_batch(arguments, config, run, say)
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
            executed_tflops=round(executed_flops(config, step) / a_step[0] / 1e9, 1),
            phases_ms=[round(ms, 1) for ms in a_step], peak_gib=peak_gib(),
        )  # fmt: skip


# --- losses -----------------------------------------------------------------------------------------------------------

CURVES: dict[str, dict[str, Any]] = {
    "fp32 masters and moments, FSDP2, plain blocks": {"masters": "parameters", "moments": "fp32", "blocks": "torch"},
    "masters in the optimizer, fp32 moments, fused": {"moments": "fp32"},
    "masters in the optimizer, bf16 moments, fused": {"moments": "bf16"},
    "masters in the optimizer, bf16 moments, fused, float8": {"moments": "bf16", "precision": "float8"},
}


def compare_losses(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """The same data and initial weights under each choice: losses every so many steps."""
    count, size, rows, length = (6, "quick", 4, 256) if arguments.quick else (300, "30m", 32, 1024)
    arguments.size, arguments.length = size, length
    base = config_of(arguments)
    steps = make_steps(base, steps=count, sequences=rows, micro_batch=rows // 2, length=length)
    for name, choice in CURVES.items():
        with guarded(lambda what, **v: record(arguments.out, "losses", what, **v), name):
            blocks = choice.get("blocks", "fused")
            values = base.to_dict() | {"block_backend": blocks, "attention_backend": arguments.attention or "auto"}
            config = UnifiedTransformerConfig.from_dict(values)
            began = time.perf_counter()
            with trainer(
                config,
                masters=choice.get("masters", "optimizer"),
                moments=choice["moments"],
                learning_rate=1e-3,
                precision=choice.get("precision", "bf16"),
            ) as run:
                curve = [train_step(run, step)[0] for step in steps]
                synchronize()
                means = [mean_losses(losses) for losses in curve]
            tail = means[-max(1, count // 6) :]
            final = {m: round(statistics.mean(x[m] for x in tail), 4) for m in MODALITIES}
            record(
                arguments.out, "losses", name, steps=count, final=final, seconds=round(time.perf_counter() - began, 1),
                curve=[means[i] for i in range(0, count, max(1, count // 15))],
            )  # fmt: skip


# --- peers ------------------------------------------------------------------------------------------------------------

PEERS = ("transformers GPT-NeoX",)


def time_peer(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """What a user would pick at these dimensions: float32 weights, autocast, every block recomputed, blocks compiled."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    ours = config_of(arguments)
    config = GPTNeoXConfig(
        vocab_size=ours.text_vocab_size, hidden_size=ours.hidden_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads, intermediate_size=ours.ffn_hidden_size, rotary_pct=1.0,
        max_position_embeddings=arguments.length, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.set_default_device(device())
    model = GPTNeoXForCausalLM(config).train()
    torch.set_default_device("cpu")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not arguments.quick:
        for layer in model.gpt_neox.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(ours.text_vocab_size, (1, arguments.length), device=device())

    def micro_batch() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    micro_batch()
    update()
    each = median_ms(micro_batch, 4, warm=1)
    last = median_ms(update, 1, warm=0) if device().type == "cuda" else 0.0
    speed = rows_of(arguments) * arguments.length / (rows_of(arguments) * each + last) * 1e3
    record(
        arguments.out,
        "peers",
        option["peer"],
        tokens_per_s=round(speed),
        micro_batch_ms=round(each, 1),
        peak_gib=peak_gib(),
    )


def summary(out: Path) -> None:
    """The table that is read first."""
    print("\n== summary")
    for r in records(out):
        if "tokens_per_s" in r:
            mfu, peak = r.get("mfu_full", ""), r.get("peak_gib")
            print(f"{r['section']:<10}{r['what']:<44}{r['tokens_per_s']:>9,} tokens/s  {mfu}  {peak}")
        elif r["what"] == "breakdown":
            print(json.dumps(r))
        elif r.get("error"):
            print(f"{r['section']:<10}{r['what']:<44}ERROR {r['error'][:200]}")
    timed = [r for r in records(out) if "tokens_per_s" in r]
    speeds = {r["section"]: r["tokens_per_s"] for r in timed if r["section"] in ("step", "peers")}
    if len(speeds) == 2:
        checked = "gradients against float64 in the section check; the peer has one head, and no packed documents"
        close([result("training step", speeds["step"], speeds["peers"], "tokens/s", checked=checked)])


if __name__ == "__main__":
    main()
