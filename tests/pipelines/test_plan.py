"""The plan before a run, against what was measured and what a run keeps."""

from __future__ import annotations

import functools
import re
from itertools import pairwise

import pytest

from model import PackedBatch, UnifiedTransformer, UnifiedTransformerConfig
from pipelines.launch import pretrain_cost
from pipelines.pretrain.parallelize import join_ranks, model_of
from pipelines.pretrain.plan import Plan, config_of, describe, dry_run, h200_tflops, make_plan, recomputed_blocks
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import RecipeError, read_recipe
from slurm.settings import ClusterRecipe
from tests.model.cases import random_rows


def planned(name: str, *overrides: str, gpus: int = 1) -> tuple[Plan, PretrainRecipe]:
    recipe = read_recipe(PretrainRecipe, name, overrides)
    config = UnifiedTransformerConfig(
        **recipe.model.model_dump(), max_sequence_length=recipe.data.sequence_length, device="cpu"
    )
    return make_plan(recipe, config, gpus=gpus), recipe


@pytest.mark.parametrize(
    ("micro_batch", "keep", "measured_gib"), [(4, "least", 132.03), (2, "least", 109.26), (2, "all", 122.76)]
)
def test_planned_memory_of_the_reference_is_within_five_percent_of_an_h200s(
    micro_batch: int, keep: str, measured_gib: float
) -> None:
    plan, _ = planned("pretrain/8b", f"batch.micro_batch={micro_batch}", f"keep={keep}")
    assert plan.memory_gib == pytest.approx(measured_gib, rel=0.05)
    assert plan.parameters == 7_596_527_616


def test_recomputation_and_more_gpus_save_memory() -> None:
    whole, part, every = (
        planned("pretrain/8b", "keep=least", *changes)[0].memory_gib
        for changes in ((), ("recompute_every=1", "recompute=feed_forward"), ("recompute_every=1",))
    )
    assert whole > part > every
    assert planned("pretrain/8b")[0].memory_gib > whole
    assert planned("pretrain/8b", gpus=8)[0].memory_gib < whole


@pytest.mark.parametrize(
    ("name", "changes", "measured"),
    [
        ("8b", (), 13_530),
        ("8b", ("precision=float8", "keep=least", "batch.micro_batch=4"), 17_655),
        ("8b", ("recompute_every=2", "keep=least", "batch.micro_batch=8"), 11_844),
        ("1b", (), 78_766),
    ],
)
def test_planned_speed_of_large_models_is_within_a_tenth_of_an_h200s(
    name: str, changes: tuple[str, ...], measured: int
) -> None:
    recipe = planned(f"pretrain/{name}", *changes)[1]
    plan = make_plan(recipe, config_of(recipe)[0], tflops=h200_tflops(recipe.precision))
    assert plan.tokens_per_second == pytest.approx(measured, rel=0.1)


def test_as_few_blocks_are_computed_again_as_a_memory_takes() -> None:
    def blocks(*changes: str, gpus: int = 1) -> list[int]:
        recipe = read_recipe(PretrainRecipe, "pretrain/8b", ["keep=least", "batch.micro_batch=4", *changes])
        return list(recomputed_blocks(recipe, config_of(recipe)[0], gpus=gpus))

    assert blocks("memory_gib=135") == []
    assert blocks("memory_gib=99", gpus=8) == []
    for memory in (131, 120, 113, 112, 95):
        plan, _ = planned("pretrain/8b", "keep=least", "batch.micro_batch=4", f"memory_gib={memory}")
        found = blocks(f"memory_gib={memory}")
        assert 1 < len(found) == plan.recomputed
        # A block less would be too much: each keeps 1.1 GiB.
        assert memory - 1.2 < plan.memory_gib <= memory
        gaps = [after - before for before, after in pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
    assert len(blocks("memory_gib=120", "recompute=feed_forward")) > len(blocks("memory_gib=120"))
    assert blocks("recompute_every=12") == [0, 12, 24]
    with pytest.raises(RecipeError, match=r"memory_gib is 80, but each of 1 ranks takes 9\d\.\d GiB with all blocks"):
        blocks("memory_gib=80")
    with pytest.raises(
        RecipeError, match="memory_gib is 80, from which follows what is computed again, but recompute_ev"
    ):
        blocks("memory_gib=80", "recompute_every=2")


def test_a_plan_tells_which_blocks_are_computed_again() -> None:
    recipe = read_recipe(PretrainRecipe, "pretrain/8b", ["keep=least", "batch.micro_batch=4", "memory_gib=120"])
    text = dry_run(recipe, tflops=700)
    assert re.search(r"computed again +\d+ blocks \(all\)", text), text


@pytest.mark.parametrize("name", ["tiny", "small", "1b", "8b", "demo"])
def test_every_shipped_recipe_can_be_planned(name: str) -> None:
    plan, recipe = planned(f"pretrain/{name}")
    text = describe(plan, recipe)
    assert f"{plan.parameters:,}" in text
    assert "GPU-hours" in text
    assert plan.tokens == recipe.total_steps * recipe.tokens_per_step


def test_a_plan_without_a_dataset_says_which_vocabularies_it_took() -> None:
    text = dry_run(read_recipe(PretrainRecipe, "pretrain/tiny", ["data.dataset=/nowhere"]), tflops=100)
    assert "the reference vocabularies, for there is no dataset yet (/nowhere: " in text
    assert "100.0 TFLOP/s as given" in text


def test_planned_parameters_are_those_of_the_model() -> None:
    plan, recipe = planned("pretrain/tiny")
    model = UnifiedTransformer(
        UnifiedTransformerConfig(**recipe.model.model_dump(), max_sequence_length=256, device="cpu")
    )
    assert plan.parameters == model.num_parameters()


def test_what_a_cluster_job_takes_is_what_the_plan_says() -> None:
    recipe = read_recipe(PretrainRecipe, "pretrain/small", ["data.dataset=/nowhere"])
    cluster = ClusterRecipe.model_validate({"partition": "main", "nodes": 2, "gpus_per_node": 4, "time": "60"})
    plan, _ = planned("pretrain/small", gpus=8)
    text = pretrain_cost([recipe], cluster)
    assert f"About {plan.gpu_hours:,.2g} GPU-hours on H200s, {plan.memory_gib:,.1f} GiB on each of 8" in text
    assert "with the reference vocabularies" in text
    assert "at most 8.0 GPU-hours (2 nodes of 4 GPUs for 60)" in text


def test_a_model_is_built_as_its_memory_allows() -> None:
    recipe = read_recipe(PretrainRecipe, "pretrain/tiny", ["data.dataset=/nowhere", "memory_gib=0.25"])
    config = config_of(recipe)[0]
    with join_ranks("cpu") as ranks:
        model = model_of(recipe, config, ranks)
        batch = PackedBatch.from_sequences(random_rows([[9]]))
        checkpointed = [isinstance(block.forward, functools.partial) for block in model.blocks]
        assert checkpointed == [False, True, False, True]
        model.loss(batch).total.backward()
        with pytest.raises(RecipeError, match=r"memory_gib is 0\.1, but each of 1 ranks takes"):
            model_of(recipe.model_copy(update={"memory_gib": 0.1}), config, ranks)
