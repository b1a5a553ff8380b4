"""Ranks, and the model wrapped for them. One process takes the very same way, as a group of one rank.

Enters: the environment of `torchrun` or `srun` if there is one, and a model's configuration. Leaves: `Ranks`, and a model
that is sharded by FSDP2, or for one rank with bfloat16 weights the model as it is: a second copy of its weights, which FSDP2
would make, is 14 GiB at 7.6 B. Always holds: the wrapping order is activation checkpointing, compilation, sharding;
parameter names stay those of the bare model; the initial weights are the same for any number of ranks. What travels between
ranks is counted in `communication`.
"""

from __future__ import annotations

import faulthandler
import functools
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from model import UnifiedTransformer, UnifiedTransformerConfig, float8, products
from model.fused import runs_fused
from pipelines.pretrain.plan import recomputed_blocks

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import PretrainRecipe, ShardingSettings

_FAREWELL_S = 60.0
"""How long the ranks that are left may take to let go of each other when one is gone."""
_NEVER = timedelta(days=365)


class DeviceError(RuntimeError):
    """The device that the recipe asks for is not there."""


class ShardingError(ValueError):
    """The model cannot be spread over these ranks as the recipe says."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, *numbers: float) -> list[float]:
        """Of each number the largest over all ranks, without any work of a GPU."""
        told = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return told.tolist()

    def agree(self, number: int) -> int:
        """The first rank's number, on all ranks."""
        shared = torch.tensor(number, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)


@contextmanager
def join_ranks(device: str = "auto", threads: int | None = None, hang_s: float = 1800.0) -> Iterator[Ranks]:
    """Become one of the ranks that the environment names (`RANK`, `WORLD_SIZE`, ...), or the only one.

    Args:
        device: "cpu", "cuda", or "auto", which prefers CUDA.
        threads: CPU threads of this process; None leaves torch's choice.
        hang_s: after so long `pipelines.pretrain.faults.Watchdog` ends a rank that waits, its stacks written down. Torch's
            own limit, which writes none and is 10 minutes for NCCL, comes after it. 0 is none.

    Raises:
        DeviceError: "cuda" is asked for and there is none.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is cuda, but torch sees no CUDA device; set device=cpu, or check the driver")
    deterministic = torch.are_deterministic_algorithms_enabled()
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # Else an embedding's gradient may add up in another order, and a resumed run would differ in the last bit.
        torch.use_deterministic_algorithms(True)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    limit = timedelta(seconds=1.5 * hang_s + 60) if hang_s else _NEVER
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=limit)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    try:
        mesh = init_device_mesh(kind, (world_size,), mesh_dim_names=("dp_shard",))
        here = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        yield Ranks(dist.get_rank(), world_size, here, mesh)
    except BaseException:
        if world_size > 1 and kind == "cuda":
            # Kernels of NCCL wait on the device for a rank that is gone, and may keep this process from ending. Nobody calls
            # this off: the process ends before, or it is ended, its stacks on stderr.
            faulthandler.dump_traceback_later(_FAREWELL_S, exit=True)
        raise
    finally:
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(deterministic)
        products.tune(False)


class ShardedTransformer(UnifiedTransformer, FSDPModule):
    """What `fully_shard` makes of a `UnifiedTransformer`, for annotations only."""


def model_of(recipe: PretrainRecipe, config: UnifiedTransformerConfig, ranks: Ranks) -> ShardedTransformer:
    """`build_model` as a recipe has it.

    Raises:
        RecipeError: its `memory_gib` does not take the model.
    """
    return build_model(
        config,
        ranks,
        seed=recipe.seed,
        precision=recipe.precision,
        recomputed=recomputed_blocks(recipe, config, gpus=ranks.world_size),
        compile_blocks=recipe.compile,
        masters=recipe.masters,
        recompute=recipe.recompute,
        keep=recipe.keep,
        tune=recipe.tune,
        sharding=recipe.sharding,
    )


def build_model(
    config: UnifiedTransformerConfig,
    ranks: Ranks,
    *,
    seed: int,
    precision: str = "bf16",
    recomputed: Collection[int] = (),
    compile_blocks: bool = False,
    masters: str = "parameters",
    recompute: str = "all",
    keep: str = "least",
    tune: bool = False,
    sharding: ShardingSettings | None = None,
) -> ShardedTransformer:
    """A sharded, initialized model whose `loss` and `token_losses` may be called like `forward`.

    Args:
        precision: "bf16" multiplies in bfloat16, keeps fp32 weights and reduces gradients in fp32; "float8" besides
            multiplies the blocks' activations and weights in float8 (`model.float8`); "fp32".
        recomputed: numbers of the blocks that keep no activations.
        compile_blocks: compile each block.
        masters: "parameters" are fp32; or they are bf16, and the "optimizer" keeps the masters.
        recompute: what those blocks compute again, "all" or "feed_forward".
        keep: what fused blocks keep of the rest, "least" or "all".
        tune: whether fused blocks look for the fastest kernel of each product (`model.products.tune`).
        sharding: how the model is spread over ranks; None is over all of them, with the defaults of a recipe.

    Raises:
        ShardingError: `sharding.dp_shard` does not divide the number of ranks.
    """
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    if masters == "optimizer":
        model.to(torch.bfloat16)
    fused = _runs_fused(config, ranks, precision)
    if recompute == "feed_forward" and recomputed and not fused:
        raise ValueError(f"recompute is {recompute!r}, which only fused blocks do: set recompute to 'all'")
    if precision == "float8":
        if not fused:
            raise ValueError("precision is 'float8', which only fused blocks do: set model.block_backend to 'fused'")
        if reason := float8.unavailable(ranks.device, torch.bfloat16):
            raise DeviceError(f"precision is 'float8', but {reason}; set it to 'bf16'")
    products.tune(tune and fused)
    for number, block in enumerate(model.blocks):
        block.float8 = precision == "float8"  # type: ignore[assignment]
        block.keep = keep  # type: ignore[assignment]
        if number in recomputed:
            block.recompute = recompute  # type: ignore[assignment]
        # Replacing `forward` of the instance, rather than wrapping the module, leaves parameter names alone and the
        # hooks of FSDP2 outside of what is compiled.
        if number in recomputed and not fused:
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False
            )
        if compile_blocks and not fused:
            block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]
    policy = MixedPrecisionPolicy()
    if precision != "fp32":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # FSDP2 sums gradients in float32, which compiled blocks cannot do for bfloat16 weights by themselves.
    if masters == "optimizer" and ranks.world_size == 1 and (fused or not compile_blocks):
        model.to_empty(device=ranks.device)
        model.reset_parameters(seed)
        return cast(ShardedTransformer, model)
    mesh = _mesh(ranks, sharding.dp_shard if sharding else None)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=policy)
    # Alone there is nothing to gain from giving up gathered weights before the backward pass.
    reshard = mesh.size(mesh.ndim - 1) > 1 and (sharding is None or sharding.reshard_after_forward)
    for block in model.blocks:
        shard(block, reshard_after_forward=reshard)
    # What the root holds, embeddings and heads, is used last in the forward pass and first in the backward pass.
    shard(model, reshard_after_forward=False)
    _gather_ahead(model, sharding.prefetch if sharding else 1)
    for method in ("loss", "token_losses", "attention_peaks"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device=ranks.device)
    model.reset_parameters(seed)
    return cast(ShardedTransformer, model)


def _mesh(ranks: Ranks, dp_shard: int | None) -> DeviceMesh:
    """All ranks in a row, or, for several copies of the model, copies x ranks of one copy, which are neighbours."""
    if dp_shard is None or dp_shard == ranks.world_size:
        return ranks.mesh
    if ranks.world_size % dp_shard:
        raise ShardingError(
            f"sharding.dp_shard is {dp_shard}, and there are {ranks.world_size} ranks: it must divide them; set it to null "
            "to spread one copy of the model over all of them"
        )
    shape = (ranks.world_size // dp_shard, dp_shard)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def _gather_ahead(model: UnifiedTransformer, count: int) -> None:
    """Have the next blocks gathered while one is computed, in both directions; the next one is FSDP2's own doing."""
    if count == 1:
        return
    blocks: list[Any] = list(model.blocks)
    for number, block in enumerate(blocks):
        if after := blocks[number + 1 : number + 1 + count]:
            block.set_modules_to_forward_prefetch(after)
        if before := blocks[max(0, number - count) : number][::-1]:
            block.set_modules_to_backward_prefetch(before)


def _runs_fused(config: UnifiedTransformerConfig, ranks: Ranks, precision: str) -> bool:
    """Whether blocks will run fused, asked before there is any input."""
    like = torch.empty(0, device=ranks.device, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    return runs_fused(config, like, training=True)
