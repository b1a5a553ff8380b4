"""Every way of spreading a model over ranks learns what one process learns, and sends what the model on paper says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from benchmarks.collectives import CountCollectives
from benchmarks.exposed import exposed_ms
from benchmarks.multi_gpu import end
from benchmarks.packed_workload import Step
from benchmarks.scaling import table
from model import PackedBatch, UnifiedTransformerConfig
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.communication import Links, predict, traffic, work_of
from pipelines.pretrain.optimizer import make_optimizer
from pipelines.pretrain.parallelize import Ranks, ShardingError, build_model, join_ranks
from pipelines.pretrain.recipe import OptimizerSettings, ShardingSettings
from pipelines.pretrain.step import clip_gradients, forward_backward
from tests.model.cases import random_rows

STEPS = 5
ROWS, MICRO_BATCHES = 8, 2
"""Of a step over all ranks; of each rank."""
CONFIG = UnifiedTransformerConfig(
    hidden_size=24, num_layers=3, num_attention_heads=2, ffn_hidden_size=50, text_vocab_size=37, image_vocab_size=29,
    audio_vocab_size=19, max_sequence_length=32, device="cpu",
)  # fmt: skip
"""Sizes that four ranks do not divide, so that padding is counted, too."""

SHARDINGS = {
    "sharded": ShardingSettings(),
    "kept after forward": ShardingSettings(reshard_after_forward=False),
    "kept after backward": ShardingSettings(reshard_after_backward=False),
    "kept for a step": ShardingSettings(reshard_after_forward=False, reshard_after_backward=False),
    "prefetch 2": ShardingSettings(prefetch=2),
    "two copies": ShardingSettings(dp_shard=2),
    "a copy on each": ShardingSettings(dp_shard=1),
}


def rank_step(step: int, rank: int, world_size: int) -> Step:
    """A rank's share of a step: rows of one modality here, of another one there."""
    mine = range(rank, ROWS, world_size)
    per_batch = len(mine) // MICRO_BATCHES
    batches = []
    for first in range(0, len(mine), per_batch):
        rows = [
            row
            for index in mine[first : first + per_batch]
            for row in random_rows([[13, 7, 9]], seed=100 * step + index, modalities=(index % 3,))
        ]
        batches.append(PackedBatch.from_sequences(rows, capacity=128))
    return Step(batches, 29 * len(mine))


def train(ranks: Ranks, sharding: ShardingSettings, precision: str = "fp32") -> dict[str, Any]:
    """Losses of some steps and, of a step more, what was sent."""
    model = build_model(CONFIG, ranks, seed=5, precision=precision, sharding=sharding)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-2, epsilon=1e-4))
    losses = []
    counted = CountCollectives()
    for number in range(STEPS + 1):
        with counted if number == STEPS else torch.enable_grad():
            told = forward_backward(
                model,
                rank_step(number, ranks.rank, ranks.world_size),  # type: ignore[arg-type]
                {"text": 1.0, "image": 0.5, "audio": 2.0},
                ranks,
                Datasets(["data"]),
                reshard_after_backward=sharding.reshard_after_backward,
            )
        losses.append((told.sums / told.counts.clamp(min=1)).tolist())
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "calls": dict(counted.calls), "size": dict(counted.size)}


def _rank(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    with join_ranks("cpu", threads=1) as ranks:
        found = {
            name: train(ranks, sharding)
            for name, sharding in SHARDINGS.items()
            if world_size % (sharding.dp_shard or 1) == 0
        }
        with pytest.raises(ShardingError, match=r"sharding.dp_shard is 3, and there are \d ranks: it must divide them"):
            build_model(CONFIG, ranks, seed=0, sharding=ShardingSettings(dp_shard=3))
        found["bf16"] = train(ranks, SHARDINGS["sharded"], "bf16")
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def alone() -> list[list[float]]:
    """Losses of one process."""
    with join_ranks("cpu") as ranks:
        losses: list[list[float]] = train(ranks, ShardingSettings())["losses"]
    return losses


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_sharding_learns_what_one_process_learns_and_sends_what_is_counted_on_paper(
    alone: list[list[float]], tmp_path: Path, world_size: int
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(world_size, port, str(tmp_path)), nprocs=world_size)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for name, found in ranks[0].items():
        tolerance = 2e-2 if name == "bf16" else 1e-5
        for ours, theirs in zip(found["losses"], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance), name
        assert all(other[name]["losses"] == found["losses"] for other in ranks), name
        half = name == "bf16"
        expected = traffic(
            CONFIG, ranks=world_size, sharding=SHARDINGS["sharded" if half else name], micro_batches=MICRO_BATCHES,
            compute_bytes=2 if half else 4,
        )  # fmt: skip
        for other in ranks:
            calls, size = dict(other[name]["calls"]), dict(other[name]["size"])
            # Counts and sums of the losses: 4 numbers, and 9, of 8 bytes.
            calls["all_reduce"] -= 2
            size["all_reduce"] -= 104
            assert {kind: calls.get(kind, 0) for kind in expected.calls} == dict(expected.calls), name
            assert {kind: size.get(kind, 0) for kind in expected.size} == dict(expected.size), name


def test_predictions_follow_from_bytes_and_bandwidth() -> None:
    config = UnifiedTransformerConfig(device="cpu")
    work = work_of(config, tokens=16384, length=4096, flops_s=600e12)
    # The step's arithmetic is that of the model's own count.
    assert 3 * 36 * work.block + work.heads == pytest.approx(16384 * config.flops_per_token(4096, "causal") / 600e12)
    one = predict(config, work, ranks=1, sharding=ShardingSettings(), micro_batches=4)
    assert one.efficiency == 1
    free = Links(nvlink_gb_s=1e9, network_gb_s=1e9, nvlink_hop_us=0, network_hop_us=0, busy_share=0)
    kept = ShardingSettings(reshard_after_forward=False, reshard_after_backward=False)
    ideal = predict(config, work, ranks=8, sharding=kept, micro_batches=1, links=free)
    # Nothing waits; only copies are left, and seven eighths of the optimizer are others' work.
    assert ideal.step == pytest.approx(ideal.alone - 7 / 8 * work.optimizer + ideal.copies, rel=1e-3)
    # A link that takes longer than the blocks do decides alone how long a step takes.
    slow = Links(nvlink_gb_s=1.0, nvlink_hop_us=0)
    bound = predict(config, work, ranks=8, sharding=ShardingSettings(), micro_batches=1, links=slow)
    told = bound.traffic
    sent = (told.size["all_gather"] + told.size["reduce_scatter"]) * 7 / 8 / 1e9
    assert bound.step == pytest.approx(sent, rel=0.03)


def test_more_gpus_more_waiting_and_copies_within_a_node_spare_the_network() -> None:
    config = UnifiedTransformerConfig(device="cpu")
    work = work_of(config, tokens=16384, length=4096, flops_s=600e12)
    found = [
        predict(config, work, ranks=ranks, sharding=ShardingSettings(), micro_batches=1).efficiency
        for ranks in (8, 64, 512)
    ]
    assert all(more > less for more, less in pairwise(found))
    node = predict(config, work, ranks=512, sharding=ShardingSettings(dp_shard=8), micro_batches=1)
    assert node.efficiency > found[-1]


@pytest.mark.parametrize("name", ["pretrain/8b", "pretrain/1b"])
def test_the_page_has_the_predictions_that_the_script_prints(name: str) -> None:
    assert table(name) in (Path(__file__).parents[2] / "docs/scaling.md").read_text()


def test_exposed_communication_is_what_nothing_else_overlaps() -> None:
    def kernel(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": start, "dur": end - start}

    found = exposed_ms(
        [
            kernel("nvjet_hsh", 0, 1000),
            kernel("ncclDevKernel_AllGather_RING_LL", 500, 2500),
            kernel("ncclDevKernel_ReduceScatter", 2000, 3000),
            kernel("Memcpy DtoD", 2200, 2400, "gpu_memcpy"),
            kernel("late", 5000, 6000),
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9000},
        ]
    )
    assert found == {"communication": 2.5, "exposed": 1.8, "computing": 2.2, "idle": 2.0}
    assert exposed_ms([]) == {}


@pytest.mark.slow
def test_a_measured_run_that_is_ended_leaves_no_rank_behind(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, time\n"
        "where = pathlib.Path(__file__).with_name('rank-' + os.environ['RANK'])\n"
        "where.with_suffix('.partial').write_text(str(os.getpid()))\n"
        "where.with_suffix('.partial').rename(where)\n"
        "time.sleep(300)\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    process = subprocess.Popen(launcher, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while len(found := list(tmp_path.glob("rank-?"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        end(process)
    for file in found:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
