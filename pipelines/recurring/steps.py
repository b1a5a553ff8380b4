"""The steps of a pipeline, each a call of what does the work by hand too.

Enters: the plan of a run. Leaves: `Done`. Always holds: each step may be killed anywhere and called again, and what it
has done is done once: tokenize through the dataset's compare-and-swap, a stage through its claim and checkpoints, an
evaluation and an export through a file or folder that appears whole.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.crash import crash_point
from pipelines.exclusive import create_exclusively
from pipelines.pretrain.stages import claim_stage, read_stages, stage_recipe
from pipelines.recurring.due import (
    LATEST,
    Due,
    evaluation_file,
    exported,
    finished_stage,
    look_at_evaluate,
    look_at_export,
    look_at_pretrain,
)
from pipelines.recurring.recipe import EvaluateStep, PipelineRecipe
from pipelines.recurring.state import Outcome, Plan
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe


class StepError(RuntimeError):
    """A step cannot do its work; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a step came to."""

    outcome: Outcome
    why: str
    did: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The recipes of a run, read back from its plan."""

    plan: Plan
    recipe: PipelineRecipe
    tokenize: TokenizeRecipe

    @classmethod
    def of(cls, plan: Plan) -> Work:
        return cls(
            plan=plan,
            recipe=PipelineRecipe.model_validate_json(json.dumps(plan.recipe), strict=True),
            tokenize=TokenizeRecipe.model_validate_json(json.dumps(plan.tokenize), strict=True),
        )

    @property
    def all_of_it(self) -> bool:
        return self.plan.trigger == "backfill"

    @property
    def run(self) -> Path:
        """Folder of the training run."""
        assert self.recipe.pretrain
        return Path(self.recipe.pretrain.output)


def is_due(name: str, work: Work) -> Due:
    """Whether a step is due, now that its turn has come."""
    look = _LOOKS.get(name)
    return look(work) if look else Due(due=True, why="")


def do_step(name: str, work: Work, due: Due) -> Done:
    """Do one step of a run, which is due."""
    return _STEPS[name](work, due)


def _tokenize(work: Work, due: Due) -> Done:
    from rich.console import Console

    from pipelines.tokenize.job import tokenize
    from pipelines.tokenize.planning import Request
    from pipelines.tokenize.progress import ProgressBar

    with ProgressBar(Console()) as progress:
        summary = tokenize(work.tokenize, progress, Request(without=frozenset(work.plan.without)))
    if not summary.units:
        return Done(outcome="skipped", why=f"all {summary.already_done:,} units are in version {summary.version}")
    return Done(
        outcome="done",
        why=f"{summary.documents:,} documents, {summary.rejects:,} in quarantine, version {summary.version}",
        did={"rejects": summary.rejects, "by_modality": summary.tokens, "version": summary.version},
    )


def _pretrain(work: Work, due: Due) -> Done:
    from rich.console import Console

    from pipelines.pretrain.loop import run
    from pipelines.pretrain.recipe import PretrainRecipe

    recipe = PretrainRecipe.model_validate_json(json.dumps(work.plan.pretrain), strict=True)
    dataset = Dataset.open(work.tokenize.dataset)
    asked_by = f"run {work.plan.number} of {work.plan.pipeline}"
    stage = claim_stage(work.run, recipe.total_steps, dataset.version, asked_by, due.stage)
    crash_point("stage_claimed")
    result = run(stage_recipe(recipe, stage), Console())
    crash_point("stage_trained")
    steps = stage.to_step - stage.from_step
    return Done(
        outcome="done",
        why=f"stage {stage.number}: {steps:,} steps on version {stage.version}, to step {stage.to_step:,}",
        did={
            "stage": stage.number,
            "steps": steps,
            "to_step": stage.to_step,
            "trained_tokens": steps * recipe.tokens_per_step,
            "trained_version": stage.version,
            "resumed_from": result.resumed_from if result.resumed_from != stage.from_step else None,
            "loss": dict(result.validation.items()) if result.validation else {},
            "baseline": dict(result.baseline.items()) if result.baseline else {},
        },
    )


def _evaluate(work: Work, due: Due) -> Done:
    from pipelines.pretrain.run import read_finished

    number = finished_stage(work.run)
    finished = read_finished(work.run)
    assert finished
    assert work.recipe.evaluate
    loss = dict(finished.validation.items()) if finished.validation else {}
    before = _last_accepted(work.run, number)
    refused = _refusal(work.recipe.evaluate, loss, before)
    content = {"stage": number, "step": finished.steps, "loss": loss, "before": before, "refused": refused}
    create_exclusively(evaluation_file(work.run, number), json.dumps(content, indent=1).encode())
    crash_point("evaluated")
    said = (
        ", ".join(f"{name} {value:.3f}" for name, value in loss.items() if "/" not in name) or "no validation documents"
    )
    return Done(
        outcome="refused" if refused else "done",
        why=f"stage {number} was refused: {refused}" if refused else f"stage {number}: {said}",
        did={"evaluated_stage": number},
    )


def _refusal(limits: EvaluateStep, loss: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Why a loss is not good enough, or ""."""
    faults = []
    for name, most in limits.at_most.items():
        if name not in loss:
            faults.append(f"{name} has a limit, but the validation split has no {name}")
        elif not loss[name] <= most:
            faults.append(f"{name} {loss[name]:.3f} over at_most = {most:g}")
    if limits.worse_by is not None:
        for kind in before.keys() & loss.keys() & {"text", "image", "audio"}:
            if not loss[kind] <= before[kind] + limits.worse_by:
                faults.append(f"{kind} {loss[kind]:.3f}, before {before[kind]:.3f}, worse by over {limits.worse_by:g}")
    return "; ".join(sorted(faults))


def _last_accepted(run: Path, number: int) -> dict[str, float]:
    """The losses of the last stage before this one that was evaluated and not refused."""
    for earlier in range(number - 1, 0, -1):
        file = evaluation_file(run, earlier)
        if file.exists() and not (record := json.loads(file.read_bytes()))["refused"]:
            return dict(record["loss"])
    return {}


def _export(work: Work, due: Due) -> Done:
    assert work.recipe.export
    folder = Path(work.recipe.export.to)
    number = finished_stage(work.run)
    stage = read_stages(work.run)[-1]
    final = exported(folder, number)
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".stage-*"):
        shutil.rmtree(rest, ignore_errors=True)
    if not final.exists():
        _copy_model(work.run / "model", partial := folder / f".{final.name}.{uuid.uuid4().hex[:8]}", stage.to_step)
        (partial / "stage.json").write_text(json.dumps(asdict(stage), indent=1))
        if (evaluation := evaluation_file(work.run, number)).exists():
            shutil.copyfile(evaluation, partial / "evaluation.json")
        crash_point("export_copied")
        partial.rename(final)
        crash_point("exported")
    link = folder / f".{LATEST}.{uuid.uuid4().hex[:8]}"
    link.symlink_to(final.name)
    link.replace(folder / LATEST)
    models = sorted(p for p in folder.glob("stage-*") if p.is_dir())
    for old in models[: -work.recipe.retention.models]:
        shutil.rmtree(old)
    return Done(outcome="done", why=f"stage {number} is in {final}", did={"exported": str(final)})


def _copy_model(source: Path, target: Path, step: int) -> None:
    """Copy an exported model and check the copy."""
    from pipelines.pretrain.checkpoint import sha256_of

    shutil.copytree(source, target)
    about = json.loads((target / "braid.json").read_bytes())
    if about["step"] != step:
        raise StepError(
            f"{source} is the model of step {about['step']}, but the stage ended with step {step}; run "
            "`braid pretrain` on the run's recipe.yaml, which writes the model of its last step"
        )
    for name, expected in about["files"].items():
        if sha256_of(target / name) != expected:
            raise StepError(f"{target / name}: the copy differs from what was trained; look at the disk of {source}")


def _clean(work: Work, due: Due) -> Done:
    from pipelines.shards.vacuum import vacuum

    retention = work.recipe.retention
    keep = retention.dataset_versions
    dataset = Dataset.open(work.tokenize.dataset)
    if keep is not None and work.recipe.pretrain and (stages := read_stages(work.run)):
        # What has come since the last stage is told from its version.
        keep = max(keep, dataset.version - stages[-1].version + 1)
    done = vacuum(dataset, older_than_hours=retention.orphans_h, keep_versions=keep)
    # Of each run this one and the plan and results of all others stay; only what was printed goes.
    folders = sorted(p for p in (Path(work.recipe.state) / "runs").glob("[0-9]*[0-9]") if p.is_dir())
    logs = [log for run in folders[: -retention.logs] for log in run.glob("*.log")]
    for log in logs:
        log.unlink(missing_ok=True)
    return Done(
        outcome="done",
        why=f"removed {len(done.removed):,} files of {done.size:,} bytes that no version needs, {len(logs):,} logs",
        did={"removed_bytes": done.size},
    )


_LOOKS: dict[str, Callable[[Work], Due]] = {
    "pretrain": lambda work: look_at_pretrain(work.recipe, work.tokenize, all_of_it=work.all_of_it),
    "evaluate": lambda work: look_at_evaluate(work.recipe),
    "export": lambda work: look_at_export(work.recipe),
}
"""Tokenize finds out by itself, and cleaning is always due."""

_STEPS: dict[str, Callable[[Work, Due], Done]] = {
    "tokenize": _tokenize,
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "export": _export,
    "clean": _clean,
}
