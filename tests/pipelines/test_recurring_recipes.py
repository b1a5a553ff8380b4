"""Recipes of pipelines: the shipped ones are read, wrong ones refused before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.recipe import RecipeError, read_recipe
from pipelines.recurring.recipe import PipelineRecipe, pipeline_path, pretrain_recipe, tokenize_recipe
from tests.pipelines.jobs import run_units
from tests.pipelines.nightly import ROOT, Nightly


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("state=s3://bucket/state", "a lease needs a file system with hard links"),
        ("pretrain.tokens=5", "give one of them"),
        ("pretrain=null", "evaluate and export work on what pretrain trains"),
        ("alerts=[{webhook: nonsense}]", "begins with http"),
        ("alerts=[{on: [failing], webhook: 'http://x'}]", "failed"),
        ("retries.runs=0", "greater than or equal to 1"),
        ("tokenise={}", "did you mean tokenize"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, override: str, said: str) -> None:
    nightly = Nightly(tmp_path)
    with pytest.raises(RecipeError, match=said):
        read_recipe(PipelineRecipe, nightly.file, [override])


def test_a_tick_with_nothing_to_do_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path, pretrain=None, evaluate=None, export=None)
    run_units(tokenize_recipe(nightly.recipe))
    code = (
        "import sys; sys.argv[1:] = ['pipeline', 'tick', sys.argv[1]]\n"
        "from pipelines.cli import app; app(standalone_mode=False)\n"
        "print([m for m in ('torch', 'ray', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(nightly.file)], capture_output=True, text=True, check=True)
    assert "nothing to do" in done.stdout
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs" / "pipeline").glob("*.yaml")))
def test_the_shipped_pipelines_and_the_recipes_that_they_name_can_be_read(name: str) -> None:
    recipe = read_recipe(PipelineRecipe, pipeline_path(name))
    tokenize = tokenize_recipe(recipe)
    pretrain = pretrain_recipe(recipe, tokenize.dataset)
    assert pretrain
    assert pretrain.data.dataset == tokenize.dataset
