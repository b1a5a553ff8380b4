"""From a token dataset to a trained model: `braid pretrain RECIPE.yaml [a.b=value ...]`.

recipe       what a run is
run          its folder: new, to be gone on with, finished
loop         next batch, forward and backward, clip, step, log, save
parallelize  ranks, and the model sharded over them
step, optimizer, schedule
validate     loss on held-out documents, beside `baseline`, what token frequencies reach
checkpoint   everything to go on from; `export` the model alone
metrics      JSON lines, the progress line, TensorBoard
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.pretrain.run import RunResult


def main(recipe: str, overrides: Iterable[str] = ()) -> RunResult:
    """Read a recipe and run it: what a job on a cluster names as `pipelines.pretrain:main`.

    Args:
        recipe: a file, or the name of a shipped recipe such as `pretrain/demo`.
        overrides: `a.b=value` each.

    Raises:
        RecipeError: the recipe has faults; see `pipelines.pretrain.loop.run` for the others.
    """
    # Here, because reading a recipe's help must not load torch and deltalake.
    from pipelines.pretrain.loop import run
    from pipelines.pretrain.recipe import PretrainRecipe
    from pipelines.recipe import read_recipe

    return run(read_recipe(PretrainRecipe, recipe, overrides))
