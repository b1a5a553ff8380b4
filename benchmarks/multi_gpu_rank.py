"""One rank of `benchmarks.multi_gpu`: optimizer steps of a recipe on the fixed workload, timed; then one step profiled.

Started by torchrun. Enters: a recipe with overrides. Leaves: a JSON line, written by the first rank. Always holds: model,
optimizer and step are those of a pretraining run (`pipelines.pretrain`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.collectives import CountCollectives
from benchmarks.exposed import exposed_ms, read_trace
from benchmarks.packed_workload import Step, executed_flops, make_steps
from model import MODALITIES, UnifiedTransformerConfig
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.communication import predict, traffic, work_of
from pipelines.pretrain.optimizer import make_optimizer
from pipelines.pretrain.parallelize import Ranks, join_ranks, model_of
from pipelines.pretrain.plan import H200_TFLOPS, SHARE_OF_PRODUCTS
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.step import Losses, clip_gradients, forward_backward
from pipelines.recipe import read_recipe

PEAK = 989e12
"""bf16, dense, of an H100 or H200 by datasheet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--override", action="append", default=[])
    parser.add_argument("--micro-batches", type=int, required=True, help="of each rank in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--label", default="{}", help="JSON that the record repeats")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = read_recipe(PretrainRecipe, arguments.recipe, arguments.override)
    with join_ranks(recipe.device, recipe.threads, hang_s=120) as ranks:
        found = measure(recipe, ranks, arguments.micro_batches, arguments.steps)
        if ranks.first:
            with arguments.out.open("a") as file:
                file.write(json.dumps(json.loads(arguments.label) | found) + "\n")


class Trainer:
    """Model and optimizer of a recipe on this rank."""

    def __init__(self, recipe: PretrainRecipe, config: UnifiedTransformerConfig, ranks: Ranks) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.model = model_of(recipe, config, ranks)
        self.optimizer = make_optimizer(self.model, recipe.optimizer)

    def step(self, batch: Step) -> Losses:
        """As `pipelines.pretrain.loop` takes it."""
        losses = forward_backward(
            self.model,
            batch,  # type: ignore[arg-type]
            self.recipe.loss_weights.model_dump(),
            self.ranks,
            Datasets(["data"]),
            reshard_after_backward=self.recipe.sharding.reshard_after_backward,
        )
        clip_gradients(self.model, self.recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses


def measure(recipe: PretrainRecipe, ranks: Ranks, micro_batches: int, count: int) -> dict[str, Any]:
    """Speed, memory and communication; every rank must call it."""
    length, micro = recipe.data.sequence_length, recipe.batch.micro_batch
    on_gpu = ranks.device.type == "cuda"
    config = UnifiedTransformerConfig(**recipe.model.model_dump(), max_sequence_length=length)
    steps = make_steps(
        config, steps=2 + count, sequences=micro_batches * micro, micro_batch=micro, length=length, seed=ranks.rank,
        pin=on_gpu,
    )  # fmt: skip
    trainer = Trainer(recipe, config, ranks)
    seconds, losses = [], []
    for step in steps:
        _meet(ranks)
        began = time.perf_counter()
        losses.append(trainer.step(step))
        _meet(ranks)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    # The first two steps compile kernels and find memory.
    timed = [(s, int(each.tokens)) for s, each in zip(seconds[2:], losses[2:], strict=True)]
    speed = statistics.median(tokens / s for s, tokens in timed) / ranks.world_size
    executed = statistics.median(
        executed_flops(config, step) / s for s, step in zip(seconds[2:], steps[2:], strict=True)
    )
    predicted = predict(
        config,
        work_of(config, tokens=micro * length, length=length, flops_s=H200_TFLOPS * 1e12 * SHARE_OF_PRODUCTS),
        ranks=ranks.world_size, sharding=recipe.sharding, micro_batches=micro_batches,
    )  # fmt: skip
    told = traffic(config, ranks=ranks.world_size, sharding=recipe.sharding, micro_batches=micro_batches)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "micro_batch": micro,
        "micro_batches": micro_batches,
        "attention": trainer.model.attention_backend_for(
            ranks.device, torch.float32 if recipe.precision == "fp32" else torch.bfloat16
        ),
        "tokens_per_s_gpu": round(speed, 1),
        "mfu_full": round(speed * config.flops_per_token(length) / PEAK, 4),
        "mfu_causal": round(speed * config.flops_per_token(length, "causal") / PEAK, 4),
        "executed_tflops": round(executed / 1e12, 1),
        "seconds_a_step": [round(s, 4) for s in seconds[2:]],
        "peak_gib": round(_largest(ranks, peak) / 2**30, 2) if on_gpu else None,
        "losses": [_means(each) for each in losses],
        "communication": _communication(trainer, steps[-1], ranks),
        "predicted": {
            "efficiency": round(predicted.efficiency, 4),
            "exposed_ms": round(1e3 * predicted.exposed, 1),
            "calls": dict(told.calls),
            "bytes": dict(told.size),
        },
    }  # fmt: skip


def _communication(trainer: Trainer, step: Step, ranks: Ranks) -> dict[str, Any]:
    """One more step, looked at: on a GPU by the profiler, elsewhere by counting what is handed to gloo."""
    if ranks.device.type != "cuda":
        with CountCollectives() as counted:
            trainer.step(step)
        return {"calls": dict(counted.calls), "bytes": dict(counted.size), "exposed": "is told by a GPU's trace alone"}
    from torch.profiler import ProfilerActivity, profile

    looking = profile(activities=[ProfilerActivity.CUDA]) if ranks.first else contextlib.nullcontext()
    _meet(ranks)
    began = time.perf_counter()
    with looking as profiler:
        trainer.step(step)
        _meet(ranks)
    wall = 1e3 * (time.perf_counter() - began)
    if profiler is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = exposed_ms(read_trace(path))
    return {f"{name}_ms": round(ms, 1) for name, ms in found.items()} | {"profiled_wall_ms": round(wall, 1)}


def _meet(ranks: Ranks) -> None:
    """All work of all ranks is done."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    if ranks.world_size > 1:
        dist.barrier()


def _largest(ranks: Ranks, number: int) -> int:
    found = torch.tensor(number, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _means(losses: Losses) -> dict[str, float]:
    sums, counts = losses.sums.tolist(), losses.counts.tolist()
    return {name: round(s / max(1, n), 6) for name, s, n in zip(MODALITIES, sums, counts, strict=True)}


if __name__ == "__main__":
    main()
