"""Training on a dataset that grows, by stages: the same run goes on for so many more steps, on the newest version.

    RUN/stages/0001.json   first and last step, dataset version, what asked for it; created exclusively

Enters: a recipe whose length is that of one stage. Leaves: the recipe of a stage, to be run like any other. Always holds: a
stage is claimed before its first step and never changes, so however often it was killed, and whoever goes on with it, it
trains on one version and ends with one step; no stage begins before the last one has ended.

The learning rate warms up once, and falls at the end of each stage, whose model can be used; the next one goes on from there
at the full rate. That is WSD-S of Wen et al. (Understanding Warmup-Stable-Decay Learning Rates, 2024), who found it no worse
than going back to the weights before the decay, and no step is trained in vain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines.exclusive import create_exclusively

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import PretrainRecipe


class StageError(ValueError):
    """A stage cannot be trained; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a run."""

    number: int
    """From 1."""
    from_step: int
    to_step: int
    version: int
    """Of the dataset."""
    asked_by: str
    """Such as a pipeline's run; for people."""
    claimed: str
    """When, in UTC."""

    @classmethod
    def read(cls, file: Path) -> Self:
        try:
            record: dict[str, Any] = json.loads(file.read_bytes())
            return cls(**record)
        except (ValueError, TypeError) as error:
            raise StageError(
                f"{file} is damaged; restore it from a copy, for it says what the run trains on"
            ) from error


def read_stages(run: Path) -> list[Stage]:
    """The stages of a run, the first one first."""
    return [Stage.read(file) for file in sorted((run / "stages").glob("[0-9]*[0-9].json"))]


def steps_done(run: Path) -> int:
    """Steps of all finished stages; what an unfinished one has done does not count.

    Raises:
        StageError: the file that says so is damaged.
    """
    file = run / "finished.json"
    try:
        return int(json.loads(file.read_bytes())["steps"]) if file.exists() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{file} is damaged; delete it, and the last stage ends anew from its checkpoint") from error


def unfinished(run: Path) -> Stage | None:
    """The stage that was claimed and has not ended."""
    stages = read_stages(run)
    return stages[-1] if stages and stages[-1].to_step > steps_done(run) else None


def claim_stage(run: Path, steps: int, version: int, asked_by: str, number: int | None = None) -> Stage:
    """The stage to train now: the unfinished one, or a new one of so many steps on a dataset version.

    Of several that ask at once, all get the same.

    Args:
        number: of the stage that is meant; one that was claimed before is returned, finished or not.

    Raises:
        StageError: the folder holds a run that was not trained by stages.
    """
    stages = read_stages(run)
    if number is not None and number <= len(stages):
        return stages[number - 1]
    if open_stage := unfinished(run):
        return open_stage
    begin = stages[-1].to_step if stages else 0
    if not stages and (steps_done(run) or (run / "recipe.yaml").exists()):
        raise StageError(f"{run}: a run that was not trained by stages lies here; set `output` to a new folder")
    stage = Stage(
        number=len(stages) + 1,
        from_step=begin,
        to_step=begin + steps,
        version=version,
        asked_by=asked_by,
        claimed=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    file = run / "stages" / f"{stage.number:04d}.json"
    if create_exclusively(file, json.dumps(asdict(stage), indent=1).encode()):
        return stage
    return Stage.read(file)


def stage_recipe(recipe: PretrainRecipe, stage: Stage) -> PretrainRecipe:
    """The recipe of a stage.

    Args:
        recipe: its length is that of the first stage, which fixes warmup and decay for all.

    Raises:
        StageError: its learning rate follows the length of the run.
    """
    schedule = recipe.schedule
    if schedule.kind != "wsd":
        raise StageError(
            f"schedule.kind = {schedule.kind}: its rate follows the length of the whole run, which is not known when a run "
            "goes on by stages; set schedule.kind: wsd"
        )
    one = recipe.total_steps
    fixed = {"warmup_steps": schedule.warmup(one), "decay_steps": schedule.decay(one)}
    values = recipe.model_dump(mode="json")
    values |= {
        "from_step": stage.from_step,
        "steps": stage.to_step,
        "tokens": None,
        "data": values["data"] | {"version": stage.version},
        "schedule": values["schedule"] | fixed,
    }
    return type(recipe).model_validate_json(json.dumps(values), strict=True)


def data_seed(recipe: PretrainRecipe) -> int:
    """Seed of the order of the data: each stage has its own, or one on an unchanged dataset would repeat the one before."""
    if not recipe.from_step:
        return recipe.seed
    digest = hashlib.blake2b(f"{recipe.seed}/{recipe.from_step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def require_stage_start(recipe: PretrainRecipe, checkpoints: Sequence[Path]) -> None:
    """Refuse to begin a stage with weights of nothing.

    Raises:
        StageError: the checkpoint that the stage goes on from is gone.
    """
    newest = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    if newest < recipe.from_step:
        raise StageError(
            f"{recipe.output}: this stage goes on from step {recipe.from_step}, but the newest checkpoint is of step "
            f"{newest}; put the checkpoint back, or set `output` to a new folder"
        )
