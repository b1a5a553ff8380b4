"""What a run will take, before it runs: parameters, arithmetic, memory by part, time.

    braid pretrain RECIPE --dry-run [--gpus 8] [--tflops 720]

Enters: a recipe, the model it describes, the number of ranks. Leaves: a `Plan`. Always holds: nothing is allocated; memory is
counted from what the code keeps, and was compared with what was measured (docs/decisions/0011). It is what torch allocates:
the CUDA context takes about 0.6 GiB besides. What several GPUs lose to each other is `communication`'s prediction.

Shapes: P parameters, L layers, D hidden, F feed-forward, T tokens of a micro-batch on one rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model import UnifiedTransformerConfig
from model.fused import fused_unavailable
from pipelines.pretrain.communication import Prediction, predict, work_of
from pipelines.recipe import RecipeError

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import PretrainRecipe

H200_TFLOPS = 720.0
"""What one H200 reaches on large bfloat16 products of random numbers (measured: 613 to 767, by shape)."""
SHARE_OF_PRODUCTS = 0.82
"""Of that rate, what a whole step reaches: the rest is attention, memory-bound work and the optimizer."""
FLOAT8_GAIN = 1.31
"""Of a whole step of `8b` on one H200 (17,655 against 13,530 tokens/s, and 17,295 against 13,189 on another day)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes."""

    parameters: int
    flops_per_token: Mapping[str, float]
    """By convention: "full" and "causal" attention."""
    memory: Mapping[str, float]
    """Bytes on each rank, by part."""
    recomputed: int
    """Blocks that are computed again in the backward pass."""
    tokens: int
    tokens_per_second: float
    """Of all ranks together."""
    gpus: int
    step: Prediction
    """What travels between ranks, and what it costs (docs/scaling.md)."""

    @property
    def memory_gib(self) -> float:
        """All parts together."""
        return sum(self.memory.values()) / 2**30

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.tokens / self.tokens_per_second

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def make_plan(
    recipe: PretrainRecipe, config: UnifiedTransformerConfig, *, gpus: int = 1, tflops: float = H200_TFLOPS
) -> Plan:
    """Plan a run on so many GPUs.

    Args:
        tflops: what one GPU reaches on large matrix products in the recipe's precision.
    """
    recomputed = len(recomputed_blocks(recipe, config, gpus=gpus))
    length = recipe.data.sequence_length
    flops = {c: config.flops_per_token(length, c) for c in ("full", "causal")}  # type: ignore[arg-type]
    again = recomputed / config.num_layers * _again(recipe, config)
    rate = tflops * 1e12 * SHARE_OF_PRODUCTS / (1 + again)
    micro_batches = max(1, recipe.batch.sequences // (recipe.batch.micro_batch * gpus))
    step = predict(
        config,
        work_of(config, tokens=recipe.batch.micro_batch * length, length=length, flops_s=rate),
        ranks=gpus,
        sharding=recipe.sharding,
        micro_batches=micro_batches,
    )
    return Plan(
        parameters=config.num_parameters(),
        flops_per_token=flops,
        memory={name: size for name, size in _memory(recipe, config, gpus, recomputed).items() if size},
        recomputed=recomputed,
        tokens=recipe.total_steps * recipe.tokens_per_step,
        tokens_per_second=gpus * rate / flops["causal"] * step.efficiency,
        gpus=gpus,
        step=step,
    )


def recomputed_blocks(recipe: PretrainRecipe, config: UnifiedTransformerConfig, *, gpus: int = 1) -> Sequence[int]:
    """Numbers of the blocks that are computed again: every n-th, or as few as its `memory_gib` takes, evenly spread.

    Raises:
        RecipeError: it does not take the model even with all of them computed again.
    """
    L = config.num_layers
    if recipe.memory_gib is None:
        return range(0, L, recipe.recompute_every) if recipe.recompute_every else range(0)
    for count in range(L + 1):
        needed = sum(_memory(recipe, config, gpus, count).values()) / 2**30
        if needed <= recipe.memory_gib:
            return [number for number in range(L) if number * count // L < (number + 1) * count // L]
    raise RecipeError(
        f"memory_gib is {recipe.memory_gib:g}, but each of {gpus} ranks takes {needed:.1f} GiB with all blocks computed "
        "again; lower batch.micro_batch, or take more GPUs"
    )


def _again(recipe: PretrainRecipe, config: UnifiedTransformerConfig) -> float:
    """What computing a block again adds to its work, of which its forward pass is a third."""
    D, F = config.hidden_size, config.ffn_hidden_size
    # A fused block does not multiply by its last matrix again, for the backward pass does not ask for what that puts out.
    made = {"feed_forward": D * F, "all": 4 * D * D + (1 if runs_fused_on_gpu(config, recipe) else 2) * D * F}
    return made[recipe.recompute] / (4 * D * D + 2 * D * F) / 3


def _memory(recipe: PretrainRecipe, config: UnifiedTransformerConfig, gpus: int, recomputed: int) -> dict[str, float]:
    P, T = config.num_parameters(), recipe.batch.micro_batch * recipe.data.sequence_length
    bf16 = recipe.precision != "fp32"
    compute = 2 if bf16 else 4
    moment = 2 if recipe.optimizer.moments == "bf16" else 4
    fused = runs_fused_on_gpu(config, recipe)
    accumulates = recipe.batch.sequences // (recipe.batch.micro_batch * gpus) > 1
    sharding, shards = recipe.sharding, recipe.sharding.dp_shard or gpus
    largest = _block_parameters(config)
    parts: dict[str, float] = {}
    if recipe.masters == "optimizer" and gpus == 1 and (fused or not recipe.compile):
        parts |= {"weights": 2 * P, "masters": 2 * P, "gradients": 4 * P}
    else:
        own = 2 if recipe.masters == "optimizer" else 4
        parts["weights"] = own * P / shards
        parts["masters"] = 2 * P / shards if recipe.masters == "optimizer" else 0
        # FSDP2 gathers weights in the compute type: for one rank it keeps them, else those of the block at work, of those
        # that are gathered ahead, and the root's.
        all_stay = shards == 1 or not sharding.reshard_after_forward
        at_once = (1 + sharding.prefetch) * largest + P - config.num_layers * largest
        parts["gathered weights"] = compute * (P if all_stay else at_once)
        # Until the last micro-batch, sums of gradients stay whole on each rank.
        parts["gradients"] = 4 * P if accumulates else own * P / shards + 4 * largest
    parts["moments"] = 2 * moment * P / shards
    parts["activations"] = _activations(recipe, config, T, compute, fused, recomputed)
    vocabulary = sum(config.vocab_sizes.values())
    chunk = min(config.loss_chunk_tokens, T)
    heads = 4 * vocabulary * config.hidden_size + chunk * max(config.vocab_sizes.values()) * (
        2 * compute if not bf16 else 2
    )
    block = T * compute * (config.ffn_hidden_size + 2 * config.hidden_size)
    parts["loss and work in progress"] = max(heads, block) + 4 * T * compute * config.hidden_size
    return parts


def _activations(
    recipe: PretrainRecipe, config: UnifiedTransformerConfig, tokens: int, compute: int, fused: bool, recomputed: int
) -> float:
    D, F, L = config.hidden_size, config.ffn_hidden_size, config.num_layers
    # A plain block keeps besides what LayerNorm and GELU put out, and queries and keys as they were before rotation.
    numbers = (6 + 2 * config.qk_norm) * D + F if fused else 10 * D + 2 * F
    outputs = 2 * D + F if fused and recipe.keep == "all" else 0
    statistics = 4 * config.num_attention_heads
    whole = (numbers + outputs) * compute + statistics
    without_wide = (numbers - F + (D if outputs else 0)) * compute + statistics
    kept = {"all": D * compute, "feed_forward": without_wide}[recipe.recompute]
    # While one block is computed again, it holds all that it did not keep.
    again = (whole - kept) if recomputed else 0
    return tokens * ((L - recomputed) * whole + recomputed * kept + again)


def _block_parameters(config: UnifiedTransformerConfig) -> int:
    D = config.hidden_size
    return 4 * D * D + 2 * D * config.ffn_hidden_size + 2 * D


def runs_fused_on_gpu(config: UnifiedTransformerConfig, recipe: PretrainRecipe) -> bool:
    """Whether the blocks will run fused on a GPU; a plan is also made where there is none."""
    if config.block_backend == "torch" or recipe.precision == "fp32":
        return False
    return fused_unavailable(config, torch.empty(0, dtype=torch.bfloat16), training=True) is None


def dry_run(recipe: PretrainRecipe, *, gpus: int = 1, tflops: float | None = None) -> str:
    """The plan of a recipe, in lines; it reads the dataset's vocabulary and nothing else.

    Args:
        tflops: see `make_plan`; by default measured on the device of the recipe if it is here, else that of one H200.
    """
    config, sizes = config_of(recipe)
    kind = "cpu" if recipe.device == "cpu" else "cuda" if torch.cuda.is_available() else ""
    if tflops is not None:
        rate = f"{tflops:,.1f} TFLOP/s as given"
    elif kind:
        tflops = measured_tflops(torch.device(kind), recipe.precision)
        rate = f"{tflops:,.2f} TFLOP/s measured here on a large product"
        rate += f" in bfloat16, times {FLOAT8_GAIN}" if recipe.precision == "float8" else ""
    else:
        tflops = h200_tflops(recipe.precision)
        rate = f"{tflops:,.0f} TFLOP/s, those of 8b on one H200 (smaller models reach less)"
    plan = make_plan(recipe, config, gpus=gpus, tflops=tflops)
    return f"With {sizes}, and {rate}:\n\n{describe(plan, recipe)}"


def config_of(recipe: PretrainRecipe) -> tuple[UnifiedTransformerConfig, str]:
    """The model of a recipe, and which vocabularies it was given: the dataset's, or without one those of the reference."""
    from pipelines.pretrain.recipe import model_config
    from pipelines.shards.dataset import Dataset, DatasetError

    try:
        # All datasets of a mixture have one vocabulary.
        first = recipe.data.parts[0]
        vocabulary = recipe.data.view_of(Dataset.open(first.dataset, first.version).vocabulary)
        return model_config(recipe, vocabulary), f"vocabularies of {first.dataset}"
    except DatasetError as error:
        config = UnifiedTransformerConfig(
            **recipe.model.model_dump(), max_sequence_length=recipe.data.sequence_length, device="cpu"
        )
        return config, f"the reference vocabularies, for there is no dataset yet ({error})"


def h200_tflops(precision: str) -> float:
    """What one H200 reaches on large products, where the GPU to come is not known."""
    return H200_TFLOPS * (FLOAT8_GAIN if precision == "float8" else 1)


def measured_tflops(device: torch.device, precision: str, size: int | None = None) -> float:
    """What this device reaches on a large product of random numbers, which are slower than zeros; a plan for float8 takes
    that of bfloat16 as so much more as whole steps are faster."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e12 * (FLOAT8_GAIN if precision == "float8" else 1)


def describe(plan: Plan, recipe: PretrainRecipe) -> str:
    """The plan in lines."""
    flops = plan.flops_per_token
    rows = [
        ("parameters", f"{plan.parameters:,} ({plan.parameters / 1e9:.2f} B)"),
        ("arithmetic", f"{flops['full'] / 1e9:.1f} GFLOP a token ({flops['causal'] / 1e9:.1f} with the causal half)"),
        ("budget", f"{plan.tokens:,} tokens, {recipe.total_steps:,} steps of {recipe.tokens_per_step:,}"),
        ("memory a rank", f"{plan.memory_gib:.1f} GiB at its peak"),
        *((f"  {name}", f"{size / 2**30:.1f} GiB") for name, size in plan.memory.items()),
        *([("computed again", f"{plan.recomputed} blocks ({recipe.recompute})")] if plan.recomputed else []),
        ("speed", f"about {plan.tokens_per_second:,.0f} tokens/s on {plan.gpus} GPU{'s' if plan.gpus > 1 else ''}"),
        *_travel(plan),
        ("time", f"about {_duration(plan.seconds)}, {plan.gpu_hours:,.1f} GPU-hours"),
    ]
    return "\n".join(f"{name:<28}{value}" for name, value in rows)


def _travel(plan: Plan) -> list[tuple[str, str]]:
    """What a rank sends and receives in a step, and what that costs; nothing for one rank."""
    if plan.gpus == 1:
        return []
    step, told = plan.step, plan.step.traffic
    kinds = ", ".join(
        f"{told.calls[kind]} x {kind.replace('_', '-')} of {told.size[kind] / 2**30:,.1f} GiB in all"
        for kind in told.calls
        if told.calls[kind]
    )
    parts = {"waiting": step.exposed, "slowed": step.slowed, "copies": step.copies}
    shares = ", ".join(f"{name} {seconds / step.step:.1%}" for name, seconds in parts.items())
    return [
        ("between ranks, a step", kinds),
        ("", f"{step.efficiency:.1%} of a GPU alone ({shares}), with the links of docs/scaling.md"),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
