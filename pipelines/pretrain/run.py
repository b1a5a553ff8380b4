"""The folder of a run: new, to be gone on with, finished, or somebody else's.

RUN/recipe.yaml        the resolved recipe, the dataset version pinned
RUN/metrics.jsonl      every step
RUN/checkpoints/       see `checkpoint`
RUN/model/             the trained model, see `export`
RUN/finished.json      written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.validate import CrossEntropy
from pipelines.recipe import dump_recipe, read_recipe
from pipelines.shards.storage import Storage


class RunError(ValueError):
    """A run cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a run came to."""

    folder: Path
    steps: int
    resumed_from: int | None
    """The step that this call went on from; None if it started the run."""
    already_finished: bool
    """Whether an earlier call had finished the run, so that this one did nothing."""
    validation: CrossEntropy | None
    """At the last step; None without validation documents."""
    baseline: CrossEntropy | None
    """What token frequencies alone reach on the same targets."""

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "model"


def claim_folder(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe of the run in its folder: the given one, with the dataset version that a run there has pinned.

    Raises:
        RunError: the folder holds a run of another recipe, or something else; the message lists what differs.
    """
    folder = Path(recipe.output)
    file = folder / "recipe.yaml"
    if not file.exists():
        if folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise RunError(f"{folder}: not empty, and no run of Braid; set `output` to a new folder")
        return recipe
    there = read_recipe(PretrainRecipe, file)
    if recipe.data.version is None:
        recipe = pin_version(recipe, there.data.version)
    # A run folder may be moved, so where it lies is no difference.
    theirs, ours = (_flat(r.model_dump(mode="json", exclude={"output"})) for r in (there, recipe))
    differing = [
        f"  {key}: {theirs.get(key)} there, {ours.get(key)} here" for key in ours if theirs.get(key) != ours[key]
    ]
    if differing:
        raise RunError(
            f"{folder} holds a run of another recipe:\n" + "\n".join(differing) + "\n"
            "Use that recipe to go on with it, or set `output` to a new folder."
        )
    return recipe


def pin_version(recipe: PretrainRecipe, version: int | None) -> PretrainRecipe:
    """The recipe with a dataset version."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"version": version})})


def write_recipe(recipe: PretrainRecipe) -> None:
    """Take the run folder for a recipe, if it is not taken yet."""
    storage = Storage.of(recipe.output)
    if not storage.exists("recipe.yaml"):
        storage.write("recipe.yaml", dump_recipe(recipe).encode())


def write_finished(result: RunResult) -> None:
    """Mark a run as finished."""
    record = {
        "steps": result.steps,
        "validation": result.validation.to_json() if result.validation else None,
        "baseline": result.baseline.to_json() if result.baseline else None,
    }
    Storage.of(result.folder).write("finished.json", json.dumps(record, indent=1).encode())


def read_finished(folder: Path) -> RunResult | None:
    """What a finished run came to; None while it is not finished."""
    file = folder / "finished.json"
    if not file.exists():
        return None
    record: Mapping[str, Any] = json.loads(file.read_bytes())
    return RunResult(
        folder=folder,
        steps=record["steps"],
        resumed_from=None,
        already_finished=True,
        validation=CrossEntropy.from_json(record["validation"]) if record["validation"] else None,
        baseline=CrossEntropy.from_json(record["baseline"]) if record["baseline"] else None,
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
