"""The plan before a run, against what was measured and what a run keeps."""

from __future__ import annotations

import pytest

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.launch import pretrain_cost
from pipelines.pretrain.plan import Plan, describe, dry_run, make_plan
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import read_recipe
from slurm.settings import ClusterRecipe


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
