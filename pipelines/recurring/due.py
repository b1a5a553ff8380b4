"""What is to be done now: a comparison of the sources with the dataset, and of the dataset with what was trained.

Enters: a pipeline's recipe. Leaves: for each step whether it is due, and why or why not, in one sentence. Always holds:
nothing is written, no clock is asked, and a tick with nothing to do loads neither torch nor Ray. The process of a step
asks here again when its turn comes, so what the steps before it did counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.corpus.errors import CorpusError, StoreError, TransientError
from pipelines.pretrain.stages import read_stages, steps_done
from pipelines.recurring.recipe import PipelineRecipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.log import changes
from pipelines.shards.reader import read_footer
from pipelines.shards.rollup import statistics_of
from pipelines.shards.statistics import Statistics
from pipelines.tokenize.budget import JobError, require_budget
from pipelines.tokenize.planning import Listing, Request, plan_for
from pipelines.tokenize.recipe import TokenizeRecipe

LATEST = "latest"
"""Link to the newest exported model: the last thing that an export does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """Whether a step is due, and why or why not."""

    due: bool
    why: str
    stage: int | None = None
    """Of pretrain, the one to be trained: a step that has finished it, and is called again, begins no other."""


@dataclass(kw_only=True)
class Found:
    """What one look found."""

    inputs: str
    """Digest over the listing of all sources."""
    tokenize: Due
    set_aside: list[str] = field(default_factory=list)
    """Units that would be done, had they not failed too often."""


def look_at_inputs(recipe: PipelineRecipe, tokenize: TokenizeRecipe, without: list[str], *, all_of_it: bool) -> Found:
    """Compare the sources with the dataset.

    Args:
        without: units that are not to be tried again.
        all_of_it: below the condition too.
    """
    try:
        listed = {source.name: Listing(source.inputs()) for source in tokenize.sources}
    except (CorpusError, StoreError, TransientError) as error:
        # The step will fail in the same way, and so it is recorded, told and not tried for ever.
        return Found(inputs=f"not to be listed: {error}", tokenize=Due(due=True, why=str(error)))
    digest = "".join(listing.digest for listing in listed.values())
    dataset = Dataset.open(tokenize.dataset) if Dataset.exists(tokenize.dataset) else None
    plan = plan_for(dataset, listed, tokenize.units, Request(without=frozenset(without)))
    aside = f"; {len(plan.set_aside)} units are set aside after failures" if plan.set_aside else ""
    if not plan.pending:
        version = f"version {dataset.version}" if dataset else "no dataset"
        due = Due(due=False, why=f"all {plan.done:,} units of the inputs are in {version}{aside}")
    else:
        new = len({(unit.source, piece.input.uri) for unit in plan.pending for piece in unit.slices})
        least = 1 if all_of_it or plan.begun else recipe.tokenize.new_inputs
        enough = new >= least
        counted = f"{new:,} new or changed inputs in {len(plan.pending):,} units"
        due = Due(
            due=enough, why=f"{counted}{aside}" if enough else f"{counted}, fewer than new_inputs = {least}{aside}"
        )
    return Found(inputs=digest, tokenize=due, set_aside=list(plan.set_aside))


def look_at_pretrain(recipe: PipelineRecipe, tokenize: TokenizeRecipe, *, all_of_it: bool) -> Due:
    """Whether a stage is to be begun, or gone on with.

    Args:
        all_of_it: below the condition too, as long as anything is new.
    """
    step = recipe.pretrain
    assert step
    run = Path(step.output)
    stages = read_stages(run)
    if stages and stages[-1].to_step > steps_done(run):
        return Due(due=True, why=f"stage {stages[-1].number} is not finished", stage=stages[-1].number)
    if not Dataset.exists(tokenize.dataset):
        return Due(due=False, why="there is no dataset yet")
    dataset = Dataset.open(tokenize.dataset)
    try:
        require_budget(tokenize, dataset)
    except JobError as error:
        return Due(due=False, why=str(error))
    since = stages[-1].version if stages else 0
    documents, tokens = added(dataset, since, tokens=step.new_tokens is not None)
    what = f"{documents:,} new documents" + (f" of {tokens:,} tokens" if step.new_tokens is not None else "")
    what += f" in version {dataset.version}" + (f" since stage {stages[-1].number}" if stages else "")
    enough = (
        documents >= (step.new_documents or 1)
        if step.new_tokens is None
        else tokens >= step.new_tokens or (step.new_documents is not None and documents >= step.new_documents)
    )
    if documents and (enough or all_of_it):
        return Due(due=True, why=what, stage=len(stages) + 1)
    wanted = [f"{name} = {n:,}" for name in ("new_documents", "new_tokens") if (n := getattr(step, name))]
    return Due(due=False, why=f"{what}, fewer than {' or '.join(wanted) or 'one'}" if documents else what)


def look_at_evaluate(recipe: PipelineRecipe) -> Due:
    """Whether the last finished stage is to be judged."""
    assert recipe.pretrain
    run = Path(recipe.pretrain.output)
    number = finished_stage(run)
    if not number:
        return Due(due=False, why="no stage is finished")
    if evaluation_file(run, number).exists():
        return Due(due=False, why=f"stage {number} was evaluated")
    return Due(due=True, why=f"stage {number} is finished")


def look_at_export(recipe: PipelineRecipe) -> Due:
    """Whether the last finished stage's model is to be exported."""
    assert recipe.pretrain
    assert recipe.export
    run = Path(recipe.pretrain.output)
    number = finished_stage(run)
    if not number:
        return Due(due=False, why="no stage is finished")
    latest = Path(recipe.export.to) / LATEST
    if (
        exported(latest.parent, number).exists()
        and latest.is_symlink()
        and latest.readlink().name == exported(latest, number).name
    ):
        return Due(due=False, why=f"stage {number} was exported")
    if recipe.evaluate:
        file = evaluation_file(run, number)
        if not file.exists():
            return Due(due=False, why=f"stage {number} was not evaluated")
        if why := json.loads(file.read_bytes())["refused"]:
            return Due(due=False, why=f"stage {number} was refused: {why}")
    return Due(due=True, why=f"stage {number} is finished")


def added(dataset: Dataset, since: int, *, tokens: bool) -> tuple[int, int]:
    """Documents, and tokens if asked for, that have come to a dataset after a version; those of changed inputs count."""
    if dataset.version <= since:
        return 0, 0
    changed = changes(dataset.storage.below("shards"), since + 1, dataset.version)
    documents = sum(file.rows for file in changed.added.values())
    if not tokens:
        return documents, 0
    if not changed.removed:
        # The roll-ups know, and no shard is opened.
        before = statistics_of(dataset.storage, dataset.vocabulary, since)
        return documents, dataset.statistics().tokens() - before.tokens()
    footers = (read_footer(dataset.storage, name)["statistics"] for name in changed.added)
    return documents, sum(Statistics.from_json(json.loads(footer)).tokens() for footer in footers)


def finished_stage(run: Path) -> int:
    """Number of the last stage, if nothing of it is left to train; else 0."""
    stages = read_stages(run)
    return stages[-1].number if stages and stages[-1].to_step <= steps_done(run) else 0


def evaluation_file(run: Path, stage: int) -> Path:
    return run / "stages" / f"{stage:04d}.evaluation.json"


def exported(folder: Path, stage: int) -> Path:
    """The folder of an exported model."""
    return folder / f"stage-{stage:04d}"
