"""The folder of a run: new, to be gone on with, finished, or somebody else's.

RUN/recipe.yaml        the resolved recipe, the dataset version pinned
RUN/metrics.jsonl      every step
RUN/checkpoints/       see `checkpoint`
RUN/model/             the trained model, see `export`
RUN/finished.json      written last
RUN/stages/            of a run that goes on by stages, see `stages`
RUN/jobs/              folders of cluster jobs that trained here
RUN/.lock              locked by the process that trains here

Always holds: of all processes on one machine or one file system with POSIX locks, one at a time writes to a run's folder.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.parallelize import Ranks
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.validate import CrossEntropy
from pipelines.recipe import dump_recipe, read_recipe
from pipelines.shards.storage import Storage

_MAY_CHANGE = (
    "threads", "logging.", "data.prefetch", "data.workers", "checkpoints.", "validation.every", "faults.hang_s",
    "faults.nonfinite_steps", "sharding.", "keep", "tune",
    "recompute", "memory_gib",
)  # fmt: skip
"""Keys of a recipe that a run may go on with another value of: they change nothing that is learned, but for rounding."""


_OF_A_STAGE = {"from_step", "steps", "tokens", "data.version", "schedule.warmup_steps", "schedule.decay_steps"}
"""What may differ between a stage and the one before it in the same folder."""

JOBS = "jobs"
_BEFORE_THE_RUN = {JOBS, "stages"}
"""May be there before the run is."""


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


@contextmanager
def hold_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made if it is not there; every rank must call it.

    The kernel lets go of the lock when the process ends, however it ends.

    Raises:
        RunError: another process trains there; on all ranks.
    """
    if not ranks.first:
        _require_held(folder, bool(ranks.agree(0)))
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        _require_held(folder, bool(ranks.agree(int(held))))
        yield


def _require_held(folder: Path, held: bool) -> None:
    if not held:
        raise RunError(f"{folder}: another process is training here; wait for it, or set `output` to a new folder")


def claim_folder(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe of the run in its folder: the given one, with the dataset version that a run there has pinned.

    A run that has neither a checkpoint nor its end is nothing to go on with: another recipe takes its folder over. So does
    the next stage of a run that has finished the one before it.

    Raises:
        RunError: the folder holds a run of another recipe, or something else; the message lists what differs.
    """
    folder = Path(recipe.output)
    if wrong := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise RunError(f"{wrong}: a file, where `output` = {recipe.output} needs a folder; set `output` to another one")
    file = folder / "recipe.yaml"
    if not file.exists():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name[0] != "." and p.name not in _BEFORE_THE_RUN):
            raise RunError(f"{folder}: not empty, and no run of Braid; set `output` to a new folder")
        return recipe
    there = read_recipe(PretrainRecipe, file)
    pinned = pin_versions(recipe, [part.version for part in there.data.parts])
    theirs, ours = _deciding(there), _deciding(pinned)
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if not differing:
        return pinned
    if not list_checkpoints(folder / "checkpoints") and not (folder / "finished.json").exists():
        return recipe
    before = read_finished(folder)
    if before and before.steps == recipe.from_step == there.total_steps and _OF_A_STAGE.issuperset(differing):
        return recipe
    if {"steps", "tokens"}.issuperset(differing):
        remedy = (
            "The learning rate follows the length of a run, so that one cannot be made longer or shorter: set `output` "
            f"to a new folder, or delete the folder {folder} to start over."
        )
    else:
        remedy = "Use that recipe to go on with it, or set `output` to a new folder."
    lines = "".join(f"  {key}: {theirs.get(key)} there, {ours[key]} here\n" for key in differing)
    raise RunError(f"{folder} holds a run of another recipe:\n{lines}{remedy}")


def pin_versions(recipe: PretrainRecipe, versions: Sequence[int | None]) -> PretrainRecipe:
    """The recipe with versions for its datasets, in the order of `recipe.data.parts`; those that it names stay."""
    if len(versions) != len(recipe.data.parts):
        return recipe
    return recipe.model_copy(update={"data": recipe.data.pinned(versions)})


def write_recipe(recipe: PretrainRecipe) -> None:
    """Take the run folder for a recipe that `claim_folder` gave."""
    Storage.of(recipe.output).write("recipe.yaml", dump_recipe(recipe).encode())


def write_finished(result: RunResult) -> None:
    """Mark a run as finished."""
    record = {
        "steps": result.steps,
        "validation": result.validation.to_json() if result.validation else None,
        "baseline": result.baseline.to_json() if result.baseline else None,
    }
    Storage.of(result.folder).write("finished.json", json.dumps(record, indent=1).encode())


def read_finished(folder: Path) -> RunResult | None:
    """What a finished run came to; None while it is not finished.

    Raises:
        RunError: the file is damaged.
    """
    file = folder / "finished.json"
    if not file.exists():
        return None
    try:
        record: Mapping[str, Any] = json.loads(file.read_bytes())
        return RunResult(
            folder=folder,
            steps=record["steps"],
            resumed_from=None,
            already_finished=True,
            validation=CrossEntropy.from_json(record["validation"]) if record["validation"] else None,
            baseline=CrossEntropy.from_json(record["baseline"]) if record["baseline"] else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{file} is damaged; delete it and start the run again, which ends it anew from its last checkpoint"
        ) from error


def _deciding(recipe: PretrainRecipe) -> dict[str, Any]:
    """What decides how a run goes, by dotted key. A run folder may be moved, so where it lies is no part of it."""
    flat = _flat(recipe.model_dump(mode="json", exclude={"output"}))
    flat = {key: Storage.of(value).uri if key.endswith(".dataset") and value else value for key, value in flat.items()}
    # What a run goes back to at a spike decides what is learned.
    decides = {"checkpoints.every"} if recipe.faults.spikes == "roll_back" else set()
    return {key: value for key, value in flat.items() if key in decides or not key.startswith(_MAY_CHANGE)}


def _flat(values: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        nested = isinstance(value, Mapping) or (isinstance(value, list) and value)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
