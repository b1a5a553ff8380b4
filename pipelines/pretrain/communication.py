"""What travels between GPUs in a training step, and what that costs: a model on paper, to be held against measurements.

Enters: a model's configuration, how it is sharded, the links between GPUs. Leaves: the collectives of a step with their
bytes, exactly; and a predicted step time, by stated assumptions. Always holds: nothing is allocated; collectives and bytes
are those that FSDP2 issues (tests/pipelines/test_sharding.py counts them on real ranks). Explained in docs/scaling.md.

Shapes: n ranks that hold one copy, r copies, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model import UnifiedTransformerConfig

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import ShardingSettings

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """What connects the GPUs. Each figure is an assumption until it is measured where the run will be."""

    gpus_per_node: int = 8
    nvlink_gb_s: float = 370.0
    """Each way and GPU, reached by collectives other than all-reduce without multicast: 450 is the line rate of an H100 or
    H200, 370 what NCCL reaches of it (NVIDIA/nccl-tests issue 212)."""
    network_gb_s: float = 46.0
    """Each way and GPU between nodes: one 400 Gb/s InfiniBand adapter, 50 GB/s; 46 to 48 are usual (nccl-tests issue 290)."""
    nvlink_hop_us: float = 3.4
    """What each rank of a ring adds, within a node."""
    network_hop_us: float = 18.0
    """The same in a ring over several nodes: 2 GiB over 256 H100s in 32 nodes were gathered at 200 GB/s (NVIDIA/nccl issue
    1218), of which the links explain 5.8 ms of 10.7."""
    busy_share: float = 0.12
    """Share of the GPU's compute that collectives take while they run: 16 of 132 multiprocessors."""

    def seconds(self, size: float, ranks: int, *, stride: int = 1) -> float:
        """Of an all-gather or a reduce-scatter by ring.

        Args:
            size: bytes of the whole, on all ranks together.
            stride: 1 for neighbours; ranks that are so far apart talk across nodes each through its own adapter.
        """
        if ranks == 1:
            return 0.0
        moved = size * (ranks - 1) / ranks
        if ranks * stride <= self.gpus_per_node:
            return moved / (self.nvlink_gb_s * 1e9) + (ranks - 1) * self.nvlink_hop_us * 1e-6
        beside = max(1, self.gpus_per_node // stride)
        # All adapters of a node work at once, so a ring is as fast as the slower of NVLink and all of them together.
        bandwidth = min(self.nvlink_gb_s, self.network_gb_s * beside) * 1e9
        return moved / bandwidth + (ranks - 1) * self.network_hop_us * 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The parameters that FSDP2 gathers and reduces together."""

    block: tuple[Shape, ...]
    root: tuple[Shape, ...]
    """Embeddings, heads, the last norm."""
    num_blocks: int

    @classmethod
    def of(cls, config: UnifiedTransformerConfig) -> Groups:
        D, F, H = config.hidden_size, config.ffn_hidden_size, config.head_size
        block: list[Shape] = [(D,), (3 * D, D), (D, D), (D,), (F, D), (D, F)]
        if config.qk_norm:
            block += [(H,), (H,)]
        sizes = config.vocab_sizes
        root: list[Shape] = [(size, D) for size in sizes.values()]
        root += [(size, D) for name, size in sizes.items() if name != "text" or not config.tie_text_embeddings]
        root += [(len(sizes), D), (D,)]
        if not config.use_rope:
            root.append((config.max_sequence_length, D))
        return cls(block=tuple(block), root=tuple(root), num_blocks=config.num_layers)


def padded_numbers(shapes: tuple[Shape, ...], ranks: int) -> int:
    """Numbers of a group as it travels: each parameter's rows are padded to a multiple of the ranks."""
    return sum(-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Collectives of one optimizer step on one rank, by kind: how many, and bytes of the whole that each is about, summed."""

    calls: Mapping[str, int]
    size: Mapping[str, int]


def traffic(
    config: UnifiedTransformerConfig,
    *,
    ranks: int,
    sharding: ShardingSettings,
    micro_batches: int,
    compute_bytes: int = 2,
    reduce_bytes: int = 4,
) -> Traffic:
    """The collectives that FSDP2 issues in a step.

    Args:
        compute_bytes: of a gathered weight.
        reduce_bytes: of a gradient as it is reduced.
    """
    n = sharding.dp_shard or ranks
    groups = Groups.of(config)
    L = groups.num_blocks
    block, root = padded_numbers(groups.block, n), padded_numbers(groups.root, n)
    gathers_block = micro_batches if sharding.reshard_after_backward else 1
    gathers_root = gathers_block
    if sharding.reshard_after_forward:
        # Without giving up after the backward pass, the next forward pass finds the weights there.
        gathers_block = 2 * micro_batches if sharding.reshard_after_backward else micro_batches + 1
    calls = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0}
    size = dict(calls)
    if n > 1:
        calls["all_gather"] = L * gathers_block + gathers_root
        size["all_gather"] = compute_bytes * (L * block * gathers_block + root * gathers_root)
        calls["reduce_scatter"] = L + 1
        size["reduce_scatter"] = reduce_bytes * (L * block + root)
    if ranks > n:
        calls["all_reduce"] = L + 1
        size["all_reduce"] = reduce_bytes * (L * block + root) // n
    return Traffic(calls=calls, size=size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one GPU computes, in seconds, without any communication."""

    block: float
    """Forward pass of a block, for one micro-batch; its backward pass takes twice as long."""
    heads: float
    """Heads and embeddings, both passes, for one micro-batch."""
    optimizer: float
    """For the whole model."""
    memory_bytes_s: float = 4.0e12
    """Copies in and out of what travels, and sums of gradients, run at this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A step of one rank, in seconds."""

    step: float
    alone: float
    """The same work on one GPU, which shards nothing."""
    exposed: float
    """Of the step: waiting for what travels."""
    slowed: float
    """Of the step: computing more slowly, because collectives take multiprocessors."""
    copies: float
    """Of the step: copying what travels in and out, and adding gradients up outside of the products."""
    traffic: Traffic = field(repr=False)

    @property
    def efficiency(self) -> float:
        """Speed of a GPU against that of one alone."""
        return self.alone / self.step


def predict(
    config: UnifiedTransformerConfig,
    work: Work,
    *,
    ranks: int,
    sharding: ShardingSettings,
    micro_batches: int,
    links: Links | None = None,
) -> Prediction:
    """A step of so many micro-batches on each rank.

    Blocks overlap with what travels for their neighbours; what is gathered before the first block and reduced after the last
    one of the backward pass overlaps with nothing.
    """
    links = links or Links()
    n = sharding.dp_shard or ranks
    groups = Groups.of(config)
    L = groups.num_blocks
    block, root = padded_numbers(groups.block, n), padded_numbers(groups.root, n)
    told = traffic(config, ranks=ranks, sharding=sharding, micro_batches=micro_batches)
    alone = micro_batches * (3 * L * work.block + work.heads) + work.optimizer
    if ranks == 1:
        return Prediction(step=alone, alone=alone, exposed=0.0, slowed=0.0, copies=0.0, traffic=told)

    def reduced(numbers: int) -> float:
        across = 2 * links.seconds(4 * numbers / n, ranks // n, stride=n) if ranks > n else 0.0
        return links.seconds(4 * numbers, n) + across

    gather, reduce = links.seconds(2 * block, n), reduced(block)
    gather_root, reduce_root = links.seconds(2 * root, n), reduced(root)
    exposed = slowed = 0.0

    def overlapped(compute: float, travel: float) -> None:
        nonlocal exposed, slowed
        # While something travels, computing goes on at 1 - busy_share of its speed.
        took = max(travel, compute + links.busy_share * travel)
        slow = min(links.busy_share * travel, took - compute)
        slowed += slow
        exposed += took - compute - slow

    for micro in range(micro_batches):
        gathered_anew = micro == 0 or sharding.reshard_after_backward
        forward = gather if gathered_anew else 0.0
        if gathered_anew:
            exposed += gather_root + gather
        last = micro == micro_batches - 1
        for _ in range(L):
            overlapped(work.block, forward)
            overlapped(2 * work.block, (gather if sharding.reshard_after_forward else 0.0) + (reduce if last else 0.0))
    exposed += reduce + reduce_root
    travelled = 2 * (told.size["all_gather"] if n > 1 else 0) + 2 * told.size["reduce_scatter"]
    # Where one GPU adds a gradient up inside its product, here it is read in two bytes, and the sum read and written in four.
    sums = 10 * (L * block + root) * micro_batches if micro_batches > 1 else 0
    copies = (travelled + sums) / work.memory_bytes_s
    computed = micro_batches * (3 * L * work.block + work.heads) + work.optimizer / n
    step = computed + exposed + slowed + copies
    return Prediction(step=step, alone=alone, exposed=exposed, slowed=slowed, copies=copies, traffic=told)


def work_of(
    config: UnifiedTransformerConfig, *, tokens: int, length: int, flops_s: float, optimizer_bytes: float = 20.0
) -> Work:
    """What a micro-batch of so many tokens takes where a whole step reaches so many operations a second.

    Args:
        flops_s: counted with the causal half of attention.
        optimizer_bytes: read and written for a parameter in a step; 20 with moments in bfloat16 (36 ms for 7.6 B, measured).
    """
    D, F, L = config.hidden_size, config.ffn_hidden_size, config.num_layers
    block = 2 * tokens * (4 * D * D + 2 * D * F) + 2 * tokens * D * length
    total = tokens * config.flops_per_token(length, "causal")
    memory = 4.0e12
    return Work(
        block=block / flops_s,
        heads=(total - 3 * L * block) / flops_s,
        optimizer=optimizer_bytes * config.num_parameters() / memory,
        memory_bytes_s=memory,
    )
