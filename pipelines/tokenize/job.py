"""The Ray job: plan, run the units on a pool of actors, commit what is finished, until nothing is pending.

Enters: a `TokenizeRecipe`. Leaves: a new version of its dataset and a `Summary`. Always holds: every input is in the
dataset once, wherever the job was killed, because a unit exists for readers only through its commit.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deltalake.exceptions import DeltaError

from pipelines.recipe import RecipeError
from pipelines.sequence import Vocabulary
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.statistics import MODALITIES, Statistics
from pipelines.shards.storage import Storage
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.budget import JobError, check_budget, require_budget
from pipelines.tokenize.history import last_settings, record_recipe
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Plan, Request, plan
from pipelines.tokenize.pool import Pool
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit

__all__ = ["JobError", "Summary", "tokenize"]

COMMIT_EVERY_S = 5.0
"""Finished units wait at most so long for their commit."""

COMMIT_SHARE = 0.05
"""Or longer, so that the driver spends no more of its time on commits: Delta's own part grows with the dataset."""

BUDGET_FROM_DOCUMENTS = 1000
"""The error budget is a share; before so many documents it is judged only at the end, over the whole dataset."""


class Progress(Protocol):
    """What a caller who wants to watch implements; `pipelines.tokenize.progress` draws a bar."""

    def started(self, plan: Plan) -> None: ...

    def finished(self, unit: WorkUnit, shard: WrittenShard, statistics: Statistics) -> None: ...


class Silent:
    """Nobody watches."""

    def started(self, plan: Plan) -> None:
        pass

    def finished(self, unit: WorkUnit, shard: WrittenShard, statistics: Statistics) -> None:
        pass


@dataclass(kw_only=True)
class Summary:
    """What one run did."""

    dataset: str
    version: int
    units: int = 0
    documents: int = 0
    rejects: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    seconds: float = 0.0
    ready_s: float = 0.0
    """Of `seconds`, until the first worker was ready."""
    already_done: int = 0
    """Units that an earlier run had done."""


def tokenize(
    recipe: TokenizeRecipe,
    progress: Progress | None = None,
    request: Request = Request(),  # noqa: B008 - it is frozen
) -> Summary:
    """Bring a dataset up to date with its sources.

    Args:
        request: what to do besides what is new or changed.

    Raises:
        RecipeError: a source was tokenized before with other settings.
        VocabularyError: the dataset was made with other tokenizers or preprocessing.
        CorpusError: a source is missing or empty, or more than half of it is to be retired.
        JobError: the error budget is spent, or a unit's worker died again and again.
    """
    began = time.monotonic()
    vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
    for source in recipe.sources:
        source.bound(vocabulary, recipe.sequence_length)
    dataset = open_or_create(recipe, vocabulary)
    ledger = Ledger(dataset.storage)
    work = plan(dataset, ledger, recipe.sources, recipe.units, request)
    summary = Summary(dataset=dataset.uri, version=dataset.version, already_done=work.done)
    if work.pending:
        witness = record_recipe(dataset.storage, recipe)
        watch = progress or Silent()
        watch.started(work)
        with Pool(recipe, witness, {unit.source for unit in work.pending}) as pool:
            summary.ready_s = pool.ready_s
            _run(recipe, dataset, ledger, work, request, pool, watch, summary)
    summary.version = dataset.version
    summary.seconds = time.monotonic() - began
    require_budget(recipe, dataset)
    return summary


def open_or_create(recipe: TokenizeRecipe, vocabulary: Vocabulary) -> Dataset:
    """The recipe's dataset, which must have this vocabulary."""
    if not Dataset.exists(recipe.dataset):
        storage = Storage.of(recipe.dataset)
        if storage.is_local and Path(storage.root).is_file():
            raise DatasetError(f"dataset = {recipe.dataset}: a file lies there; name a folder")
        try:
            return Dataset.create(
                recipe.dataset,
                vocabulary,
                validation_share=recipe.validation_share,
                duplicates=recipe.duplicates,
            )
        except DeltaError:
            # Another job may have made it just now; then this one joins in.
            if not Dataset.exists(recipe.dataset):
                raise
    dataset = Dataset.open(recipe.dataset)
    check_dataset(dataset, recipe, vocabulary)
    return dataset


def check_dataset(dataset: Dataset, recipe: TokenizeRecipe, vocabulary: Vocabulary) -> None:
    """Refuse to add rows to a dataset that would not be like those it has."""
    dataset.vocabulary.require_same(vocabulary, this=f"dataset {recipe.dataset}", that="this recipe")
    if dataset.validation_share != recipe.validation_share:
        raise RecipeError(
            f"validation_share = {recipe.validation_share}: dataset {recipe.dataset} was made with "
            f"{dataset.validation_share}, and the split must stay; set it to that, or write to a new dataset"
        )
    if dataset.duplicates != recipe.duplicates:
        raise RecipeError(
            f"duplicates = {recipe.duplicates}: dataset {recipe.dataset} was made with {dataset.duplicates}, and whoever "
            "trains on it counts on that; set it to that, or write to a new dataset"
        )
    before = last_settings(dataset.storage)
    for source in recipe.sources:
        now, fields = source.model_dump(mode="json"), type(source).model_fields
        # A recipe of before a setting was there had, in effect, its default.
        optional = {k: f.get_default(call_default_factory=True) for k, f in fields.items() if not f.is_required()}
        defaults = source.model_copy(update=optional).model_dump(mode="json")
        then = defaults | before.get(source.name, now)
        for key in ("reader", *sorted(source.decides_rows)):
            if now.get(key) != then.get(key):
                raise RecipeError(
                    f"sources: {source.name}: {key} = {now.get(key)!r}, but this dataset has rows of that source made with "
                    f"{then.get(key)!r}; give the source another name, or write to a new dataset"
                )


def _run(
    recipe: TokenizeRecipe,
    dataset: Dataset,
    ledger: Ledger,
    work: Plan,
    request: Request,
    pool: Pool,
    progress: Progress,
    summary: Summary,
) -> None:
    """Keep every worker busy, and commit what is finished in batches."""
    # The largest first, so that no straggler is left for the end.
    units = sorted(work.pending, key=lambda unit: -unit.size)
    finished = Finished(work)
    commit_at = time.monotonic() + COMMIT_EVERY_S
    try:
        for done in pool.run(units, COMMIT_EVERY_S):
            if done:
                unit, shard = done
                finished.add(unit, shard)
                progress.finished(unit, shard, Statistics.from_json(shard.statistics))
                # Units that are tried again were chosen for their rejects: they are judged among all others, at the end.
                if not request.retry and finished.documents + finished.rejects >= BUDGET_FROM_DOCUMENTS:
                    check_budget(recipe, finished.documents, finished.rejects)
            if (began := time.monotonic()) > commit_at:
                _commit(dataset, ledger, finished, summary)
                now = time.monotonic()
                commit_at = now + max(COMMIT_EVERY_S, (now - began) / COMMIT_SHARE)
    finally:
        # What is finished is good, also when the job stops here.
        _commit(dataset, ledger, finished, summary)


class Finished:
    """Finished units that wait for their commit; units that replace the same ones, or are retired, wait for one another."""

    def __init__(self, work: Plan) -> None:
        self._together = work.together
        self._missing = Counter(self._group(unit) for unit in work.pending)
        self._waiting: list[tuple[WorkUnit, WrittenShard]] = []
        self.documents = self.rejects = 0
        """Of all that were added."""

    def add(self, unit: WorkUnit, shard: WrittenShard) -> None:
        self._waiting.append((unit, shard))
        self.documents += shard.rows
        self.rejects += shard.rejects
        self._missing[self._group(unit)] -= 1

    def take(self) -> list[WrittenShard]:
        """What may be committed now."""
        ready = [shard for unit, shard in self._waiting if not self._missing[self._group(unit)]]
        self._waiting = [(unit, shard) for unit, shard in self._waiting if self._missing[self._group(unit)]]
        return ready

    def _group(self, unit: WorkUnit) -> tuple[str, ...]:
        """What waits for one another has the same group; whoever waits for nobody is alone in it."""
        return ("together",) if unit.id in self._together else unit.replaces or (unit.id,)


def _commit(dataset: Dataset, ledger: Ledger, finished: Finished, summary: Summary) -> None:
    if not (ready := finished.take()):
        return
    for shard in dataset.commit(ready, ancestors=ledger.ancestors):
        statistics = Statistics.from_json(shard.statistics)
        summary.units += 1
        summary.documents += shard.rows
        summary.rejects += shard.rejects
        for modality in MODALITIES:
            summary.tokens[modality] += statistics.tokens(modality)
