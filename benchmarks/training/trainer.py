"""Model, optimizer and one optimizer step, as a pretraining run makes them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.packed_workload import Step, make_steps
from benchmarks.training.records import device, mark, peak_gib, records, synchronize
from model import UnifiedTransformerConfig
from model.attention import BACKENDS


@contextlib.contextmanager
def trainer(
    config: UnifiedTransformerConfig, *, masters: str = "optimizer", moments: str = "bf16", learning_rate: float = 3e-4,
    recompute_every: int = 0, recompute: str = "all", keep: str = "least", compile_blocks: bool = False,
    precision: str = "bf16", tune: bool = False,
) -> Iterator[SimpleNamespace]:  # fmt: skip
    """Model, optimizer and ranks as a pretraining run makes them."""
    from pipelines.pretrain.optimizer import make_optimizer
    from pipelines.pretrain.parallelize import build_model, join_ranks

    settings = SimpleNamespace(
        learning_rate=learning_rate, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, fused=True, moments=moments
    )
    with join_ranks("auto") as ranks:
        model = build_model(
            config, ranks, seed=0, precision=precision, masters=masters,
            recomputed=range(0, config.num_layers, recompute_every) if recompute_every else (),
            recompute=recompute, keep=keep, tune=tune, compile_blocks=compile_blocks,
        )  # fmt: skip
        yield SimpleNamespace(
            model=model, ranks=ranks, optimizer=make_optimizer(model, settings), masters=masters, moments=moments
        )


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


def largest_micro_batch(
    arguments: argparse.Namespace, config: UnifiedTransformerConfig, run: SimpleNamespace, say: Callable[..., None]
) -> int:
    """Rows of a micro-batch that fit, after a step of two of them; 0 if none do."""
    for micro in map(int, arguments.micro.split(",")):
        warm = make_steps(config, steps=1, sequences=2 * micro, micro_batch=micro, length=arguments.length, seed=9)[0]
        try:
            train_step(run, warm)
            synchronize()
            say("fits", micro_batch=micro, peak_gib=peak_gib())
            return micro
        except torch.OutOfMemoryError as error:
            say("does not fit", micro_batch=micro, peak_gib=peak_gib(), error=str(error)[:160])
            message = None  # noqa: F841
        run.optimizer.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return 0
