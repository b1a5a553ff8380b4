"""The error budget: how much of a dataset may be in quarantine before its maker must look.

Enters: counts, or a dataset. Leaves: nothing, or a `JobError`. It stands apart from the job, so that whoever asks need not
load Ray.
"""

from __future__ import annotations

from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe


class JobError(RuntimeError):
    """The job had to stop; what it committed stays, and the same command goes on from there."""


def require_budget(recipe: TokenizeRecipe, dataset: Dataset) -> None:
    """Refuse a dataset of which too much is in quarantine.

    It is judged over the whole dataset: a second try must not walk through a budget that the first one spent.

    Raises:
        JobError: the message says what to do.
    """
    check_budget(recipe, dataset.statistics().documents, dataset.rejects())


def check_budget(recipe: TokenizeRecipe, documents: int, rejects: int) -> None:
    """Refuse counts of documents and rejects over the recipe's budget; see `require_budget`."""
    seen = documents + rejects
    if rejects > recipe.error_budget * seen:
        raise JobError(
            f"{rejects} of {seen} documents ({rejects / seen:.1%}) could not be tokenized, over the "
            f"error_budget of {recipe.error_budget:.1%}; see why with `braid quarantine list {recipe.dataset}`, then mend "
            "the inputs (changed files are done again) or raise error_budget. What is done stays committed."
        )
