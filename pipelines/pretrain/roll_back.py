"""Going back at a spike: all steps since the last checkpoint are taken anew, with the batches that come after it.

Enters: the first step, of those the host has heard of, that was skipped as a spike. Leaves: weights, optimizer and what is
usual as they were at the checkpoint, the loader behind the batch of the spike. Always holds: which checkpoint it is, and how
often, follows from recipe and steps alone, whenever the host hears of the spike and however often the run was killed; so
an undisturbed run and one that was killed go back at the same steps. That is why a spike is asked for before every save,
and why a checkpoint that a signal asked for is never the one to go back to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.loading import Loader
from pipelines.pretrain.checkpoint import delete_after, load_checkpoint, path_of
from pipelines.pretrain.faults import Guard
from pipelines.pretrain.metrics import ROLL_BACK, Metrics
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.saving import Saver


def target_of(recipe: PretrainRecipe, spike: int) -> int:
    """The step to go back to at a spike: the last regular checkpoint before it, or where the stage began; 0 is none."""
    every = recipe.checkpoints.every
    return max(recipe.from_step, (spike - 1) // every * every)


class RollBack:
    """Goes back where the recipe says so; every rank has one and calls it at the same steps."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        *,
        loader: Loader,
        model: ShardedTransformer,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        saver: Saver,
        metrics: Metrics,
        ranks: Ranks,
    ) -> None:
        self._recipe, self._on = recipe, recipe.faults.spikes == "roll_back"
        self._loader, self._model, self._optimizer, self._guard = loader, model, optimizer, guard
        self._saver, self._metrics, self._ranks = saver, metrics, ranks
        self._places: dict[int, dict[str, Any]] = {}
        """Where the next step's data begin, for the steps whose losses the host may not have heard of."""

    def taken(self, step: int) -> None:
        """Remember where the data stand after a step."""
        if self._on:
            self._places[step] = self._loader.state_dict()
            self._places.pop(step - self._recipe.logging.every - 1, None)

    def due(self, *, ask: bool) -> int | None:
        """The step to go back to, now that it was done; None if there is nothing to go back for.

        Args:
            ask: fetch what the device knows; else only what it has told is looked at.
        """
        if not self._on:
            return None
        if ask:
            self._metrics.flush()
        if self._metrics.spike is None:
            return None
        (spike, record), self._metrics.spike = self._metrics.spike, None
        target = target_of(self._recipe, spike)
        if reason := self._forbidden(target):
            self._metrics.say(f"step {spike}: a spike, skipped; {reason}")
            return None
        count = self._guard.roll_backs + 1
        checkpoint = load_checkpoint(self._path(target), self._model, self._optimizer, self._ranks)
        self._guard.load_state_dict(checkpoint.guard)
        self._guard.roll_backs = count
        self._loader.load_state_dict(self._places[spike])
        self._places.clear()
        if self._ranks.first:
            # They are of steps that are no longer part of the run.
            delete_after(self._path(target).parent, target)
        self._metrics.go_back(target)
        told = {"spike": spike, "to": target, "batches": spike - target, "count": count, "loss": record["loss"]}
        self._metrics.write(ROLL_BACK, target + 1, told)
        self._metrics.say(
            f"step {spike}: a spike, losses {record['loss']}; going on from step {target} with the batches after it "
            f"({count} of at most {self._recipe.faults.roll_backs} times)"
        )
        return target

    def _forbidden(self, target: int) -> str:
        """Why not to go back, if so."""
        if self._guard.roll_backs >= (most := self._recipe.faults.roll_backs):
            return f"the run went back to step {target} {most} times, which is as often as faults.roll_backs allows"
        if not target:
            return "there is no checkpoint yet to go back to"
        # What is copied may be of the steps that are taken back.
        self._saver.settle()
        if not self._ranks.agree(int(self._path(target).is_dir())):
            return f"the checkpoint of step {target} is not there to go back to"
        return ""

    def _path(self, step: int) -> Path:
        return path_of(Path(self._recipe.output) / "checkpoints", step)
