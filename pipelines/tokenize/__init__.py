"""The tokenize job: raw corpora in, a versioned token dataset out. `braid tokenize RECIPE.yaml` comes here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.tokenize.job import Summary

RETIRE, FORCE, RETRY = "--retire-missing", "--force", "--retry"


def main(recipe: str, arguments: Iterable[str] = ()) -> Summary:
    """Read a recipe and run it: what a job on a cluster names as `pipelines.tokenize:main`.

    Args:
        recipe: a file, or the name of a shipped recipe such as `tokenize/demo`.
        arguments: overrides `a.b=value`; `--retire-missing`, `--force`, `--retry` and `--reason=REASON`.

    Raises:
        RecipeError: the recipe has faults; see `pipelines.tokenize.job.tokenize` for the others.
    """
    # Here, because reading a recipe's help must not load Ray and torch.
    from rich.console import Console

    from pipelines.recipe import read_recipe
    from pipelines.tokenize.job import tokenize
    from pipelines.tokenize.planning import Request
    from pipelines.tokenize.progress import ProgressBar
    from pipelines.tokenize.recipe import TokenizeRecipe

    options = [a for a in arguments if a.startswith("--")]
    overrides = [a for a in arguments if not a.startswith("--")]
    request = Request(
        retire_missing=RETIRE in options,
        force=FORCE in options,
        retry=RETRY in options,
        reasons=tuple(o.removeprefix("--reason=") for o in options if o.startswith("--reason=")),
    )
    with ProgressBar(Console()) as progress:
        summary = tokenize(read_recipe(TokenizeRecipe, recipe, overrides), progress, request)
    print(f"done: {asdict(summary)}", flush=True)
    return summary
