"""The communication model's table: `python -m benchmarks.scaling [--recipe pretrain/8b]`.

Predicted step time and efficiency of FSDP and HSDP on 8, 64 and 512 GPUs, in Markdown, as docs/scaling.md has it. Nothing is
measured: `python -m benchmarks.multi_gpu` does that, and prints the prediction for its own machine beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from model import UnifiedTransformerConfig
from pipelines.pretrain.communication import Links, predict, traffic, work_of
from pipelines.pretrain.plan import H200_TFLOPS, SHARE_OF_PRODUCTS, make_plan
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import read_recipe

GPUS = (8, 64, 512)
MICRO_BATCHES = (1, 4)
ROWS = 4
"""Of a micro-batch. More than `8b` takes on one GPU: several have room, and less travels for a token."""
SHARDINGS = {
    "FSDP": (),
    "FSDP, weights kept for a step": ("sharding.reshard_after_forward=false", "sharding.reshard_after_backward=false"),
    "HSDP of 8": ("sharding.dp_shard=8",),
}


def rows(name: str) -> Iterator[list[str]]:
    """Cells of the table, line by line."""
    for sharded, overrides in SHARDINGS.items():
        for gpus in GPUS:
            if "HSDP" in sharded and gpus == 8:
                # One node holds one copy: that is FSDP.
                continue
            for micro_batches in MICRO_BATCHES:
                per_step = f"batch.sequences={micro_batches * gpus * ROWS}"
                budget = ("steps=1000", "tokens=null", "schedule.warmup_steps=100")
                recipe = read_recipe(PretrainRecipe, name, [*overrides, f"batch.micro_batch={ROWS}", per_step, *budget])
                config = config_of(recipe)
                plan = make_plan(recipe, config, gpus=gpus)
                step = plan.step
                yield [
                    sharded,
                    str(gpus),
                    str(micro_batches),
                    f"{sum(step.traffic.size.values()) / 2**30:,.1f}",
                    f"{1e3 * step.alone:,.0f}",
                    f"{1e3 * step.step:,.0f}",
                    f"{1e3 * step.exposed:,.0f}",
                    f"{1e3 * step.slowed:,.0f}",
                    f"{1e3 * step.copies:,.0f}",
                    f"{100 * step.efficiency:.1f}%",
                    f"{plan.memory_gib:.0f}",
                ]


def config_of(recipe: PretrainRecipe) -> UnifiedTransformerConfig:
    """The model of a recipe with the reference vocabularies."""
    return UnifiedTransformerConfig(
        **recipe.model.model_dump(), max_sequence_length=recipe.data.sequence_length, device="cpu"
    )


HEAD = [
    "sharding", "GPUs", "micro-batches", "GiB travel", "ms alone", "ms", "waiting", "slowed", "copies", "efficiency",
    "GiB held",
]  # fmt: skip


def table(name: str) -> str:
    """Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows(name)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def per_block(name: str) -> str:
    """What one block of a recipe costs on eight GPUs of a node and on 512, in words."""
    recipe = read_recipe(PretrainRecipe, name, [f"batch.micro_batch={ROWS}"])
    config, links = config_of(recipe), Links()
    length, tokens = recipe.data.sequence_length, recipe.batch.micro_batch * recipe.data.sequence_length
    work = work_of(config, tokens=tokens, length=length, flops_s=H200_TFLOPS * 1e12 * SHARE_OF_PRODUCTS)
    one = traffic(config, ranks=8, sharding=recipe.sharding, micro_batches=1)
    told = predict(config, work, ranks=8, sharding=recipe.sharding, micro_batches=1, links=links)
    gathered = one.size["all_gather"] / one.calls["all_gather"]
    return (
        f"{name}: a block computes {1e3 * work.block:.1f} ms forward and {2e3 * work.block:.1f} backward; "
        f"{gathered / 2**20:.0f} MiB on average are gathered in {1e3 * links.seconds(gathered, 8):.2f} ms on 8 GPUs, "
        f"{1e3 * links.seconds(gathered, 64):.2f} on 64 and {1e3 * links.seconds(gathered, 512):.2f} on 512; "
        f"{told.efficiency:.1%} on 8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", action="append", help="default: pretrain/8b and pretrain/1b")
    for name in parser.parse_args().recipe or ["pretrain/8b", "pretrain/1b"]:
        print(f"{per_block(name)}\n\n{table(name)}\n")


if __name__ == "__main__":
    main()
