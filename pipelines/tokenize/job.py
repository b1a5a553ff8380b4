"""The Ray job: plan, run the units on a pool of actors, commit what is finished, until nothing is pending.

Enters: a `TokenizeRecipe`. Leaves: a new version of its dataset and a `Summary`. Always holds: every input is in the
dataset once, wherever the job was killed, because a unit exists for readers only through its commit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import ray
import yaml
from deltalake.exceptions import DeltaError
from ray.exceptions import RayActorError

from pipelines.recipe import RecipeError, dump_recipe
from pipelines.sequence import Vocabulary
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.statistics import MODALITIES, Statistics
from pipelines.shards.storage import Storage
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import Ledger, Plan, WorkUnit, plan
from pipelines.tokenize.worker import UnitWorker

COMMIT_EVERY_S = 5.0
"""Finished units wait at most so long for their commit."""

BUDGET_FROM_DOCUMENTS = 1000
"""The error budget is a share; before so many documents it is judged only at the end, over the whole dataset."""

IN_FLIGHT = 2
"""Units handed to each worker: the next one waits there while one runs."""


class JobError(RuntimeError):
    """The job had to stop; what it committed stays, and the same command goes on from there."""


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
    already_done: int = 0
    """Units that an earlier run had done."""


def tokenize(recipe: TokenizeRecipe, progress: Progress | None = None) -> Summary:
    """Bring a dataset up to date with its sources.

    Raises:
        RecipeError: a source was tokenized before with other settings.
        VocabularyError: the dataset was made with other tokenizers or preprocessing.
        CorpusError: a source is missing or empty.
        JobError: the error budget is spent, or a unit's worker died again and again.
    """
    began = time.monotonic()
    vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
    dataset = open_or_create(recipe, vocabulary)
    ledger = Ledger(dataset.storage)
    work = plan(dataset, ledger, recipe.sources, recipe.units)
    summary = Summary(dataset=dataset.uri, version=dataset.version, already_done=work.done)
    if work.pending:
        _record_recipe(dataset, recipe)
        watch = progress or Silent()
        watch.started(work)
        with _cluster(recipe) as actors:
            _run(recipe, dataset, ledger, work, actors, watch, summary)
    summary.version = dataset.version
    summary.seconds = time.monotonic() - began
    # Judged over the whole dataset: a second try must not walk through a budget that the first one spent.
    _check_budget(recipe, dataset.statistics().documents, len(dataset.quarantined()))
    return summary


def open_or_create(recipe: TokenizeRecipe, vocabulary: Vocabulary) -> Dataset:
    """The recipe's dataset, which must have this vocabulary."""
    if not Dataset.exists(recipe.dataset):
        storage = Storage.of(recipe.dataset)
        if storage.is_local and Path(storage.root).is_file():
            raise DatasetError(f"dataset = {recipe.dataset}: a file lies there; name a folder")
        try:
            return Dataset.create(recipe.dataset, vocabulary, validation_share=recipe.validation_share)
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
    before = _last_settings(dataset)
    for source in recipe.sources:
        now = source.model_dump(mode="json")
        then = before.get(source.name, now)
        for key in ("reader", *sorted(source.decides_rows)):
            if now.get(key) != then.get(key):
                raise RecipeError(
                    f"sources: {source.name}: {key} = {now.get(key)!r}, but this dataset has rows of that source made with "
                    f"{then.get(key)!r}; give the source another name, or write to a new dataset"
                )


def _last_settings(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Each source's settings in the newest recipe that named it."""
    settings: dict[str, dict[str, Any]] = {}
    for name in dataset.storage.names("recipes"):
        for source in yaml.safe_load(dataset.storage.read(f"recipes/{name}"))["sources"]:
            settings[source["name"]] = source
    return settings


def _record_recipe(dataset: Dataset, recipe: TokenizeRecipe) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    dataset.storage.write(f"recipes/{stamp}-{uuid.uuid4().hex[:6]}.yaml", dump_recipe(recipe.anchored()).encode())


@contextlib.contextmanager
def _cluster(recipe: TokenizeRecipe) -> Iterator[list[Any]]:
    """A Ray of our own on this machine with one actor for each worker."""
    workers = recipe.workers or os.cpu_count() or 1
    # Ray tells on every start that its token authentication is on, as it should be.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # "local", because a Ray that crashed leaves an address behind which the default would try to join.
    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)(UnitWorker)
        yield [worker.remote(recipe) for _ in range(workers)]
    finally:
        ray.shutdown()


def _run(
    recipe: TokenizeRecipe,
    dataset: Dataset,
    ledger: Ledger,
    work: Plan,
    actors: list[Any],
    progress: Progress,
    summary: Summary,
) -> None:
    """Keep every worker busy, commit in batches; a unit whose worker died is tried again, a bounded number of times."""
    # The largest first, so that no straggler is left for the end.
    waiting = deque(sorted(work.pending, key=lambda unit: -unit.size))
    load = Counter(dict.fromkeys(range(len(actors)), 0))
    running: dict[Any, tuple[WorkUnit, int]] = {}
    tries: Counter[str] = Counter()
    finished = Finished(work)
    committed_at = time.monotonic()
    try:
        while waiting or running:
            while waiting and min(load.values()) < IN_FLIGHT:
                index = min(load, key=lambda i: load[i])
                unit = waiting.popleft()
                load[index] += 1
                running[actors[index].run.remote(unit)] = (unit, index)
            done, _ = ray.wait(list(running), num_returns=1, timeout=COMMIT_EVERY_S)
            for reference in done:
                unit, index = running.pop(reference)
                load[index] -= 1
                try:
                    shard = ray.get(reference)
                except RayActorError as error:
                    tries[unit.id] += 1
                    if tries[unit.id] >= recipe.units.tries:
                        raise JobError(_worker_died(unit, tries[unit.id])) from error
                    waiting.append(unit)
                    continue
                finished.add(unit, shard)
                progress.finished(unit, shard, Statistics.from_json(shard.statistics))
                if finished.documents + finished.rejects >= BUDGET_FROM_DOCUMENTS:
                    _check_budget(recipe, finished.documents, finished.rejects)
            if time.monotonic() - committed_at > COMMIT_EVERY_S:
                _commit(dataset, ledger, finished, summary)
                committed_at = time.monotonic()
    finally:
        # What is finished is good, also when the job stops here.
        _commit(dataset, ledger, finished, summary)


class Finished:
    """Finished units that wait for their commit; units that replace the same ones wait for one another."""

    def __init__(self, work: Plan) -> None:
        self._missing = Counter(unit.replaces for unit in work.pending if unit.replaces)
        self._waiting: list[tuple[WorkUnit, WrittenShard]] = []
        self.documents = self.rejects = 0
        """Of all that were added."""

    def add(self, unit: WorkUnit, shard: WrittenShard) -> None:
        self._waiting.append((unit, shard))
        self.documents += shard.rows
        self.rejects += shard.rejects
        if unit.replaces:
            self._missing[unit.replaces] -= 1

    def take(self) -> list[WrittenShard]:
        """What may be committed now."""
        ready = [shard for unit, shard in self._waiting if not self._missing[unit.replaces]]
        self._waiting = [(unit, shard) for unit, shard in self._waiting if self._missing[unit.replaces]]
        return ready


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


def _check_budget(recipe: TokenizeRecipe, documents: int, rejects: int) -> None:
    seen = documents + rejects
    if rejects > recipe.error_budget * seen:
        raise JobError(
            f"{rejects} of {seen} documents ({rejects / seen:.1%}) could not be tokenized, over the "
            f"error_budget of {recipe.error_budget:.1%}; see why with `braid quarantine list {recipe.dataset}`, then mend "
            "the inputs (changed files are done again) or raise error_budget. What is done stays committed."
        )


def _worker_died(unit: WorkUnit, tries: int) -> str:
    first, last = unit.slices[0], unit.slices[-1]
    return (
        f"the worker of unit {unit.id} died {tries} times, last without a Python error (out of memory, or killed): "
        f"{len(unit.slices)} inputs of source {unit.source}, from {first.input.uri} to {last.input.uri}. "
        "Lower units.bytes or workers, or look at these inputs."
    )
