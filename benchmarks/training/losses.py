"""Loss curves of leaner masters, gradients, moments and products, side by side."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.packed_workload import make_steps
from benchmarks.training.records import config_of, guarded, mean_losses, record, synchronize
from benchmarks.training.trainer import train_step, trainer
from model import MODALITIES, UnifiedTransformerConfig

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
