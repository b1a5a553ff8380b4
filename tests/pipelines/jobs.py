"""The tokenize job without Ray, for tests: the same plan, work and commit, in this process."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from pipelines.recipe import read_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.verify import verify
from pipelines.tokenize.history import record_recipe
from pipelines.tokenize.job import open_or_create
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Plan, Request, plan
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.tiny import text_tokenizer


def run_units(recipe: TokenizeRecipe, request: Request = Request(), *, each: bool = False) -> Dataset:  # noqa: B008
    """Bring a dataset up to date, with one commit, or one for each unit."""
    worker = UnitWorker(recipe)
    dataset = open_or_create(recipe, worker.vocabulary)
    ledger = Ledger(dataset.storage)
    work = plan(dataset, ledger, recipe.sources, recipe.units, request)
    if work.pending:
        record_recipe(dataset.storage, recipe)
    for units in [[unit] for unit in work.pending] if each else [work.pending]:
        dataset.commit([worker.run(unit) for unit in units], ancestors=ledger.ancestors)
    return dataset


def make_plan(recipe: TokenizeRecipe, request: Request = Request()) -> Plan:  # noqa: B008
    """Only the plan, as of a job that died right after it."""
    dataset = open_or_create(recipe, UnitWorker(recipe).vocabulary)
    return plan(dataset, Ledger(dataset.storage), recipe.sources, recipe.units, request)


def like_fresh(recipe: TokenizeRecipe, folder: Path, request: Request = Request()) -> bool:  # noqa: B008
    """Whether the dataset, brought up to date, equals one made from nothing."""
    fresh = folder / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    dataset = run_units(recipe, request)
    assert list(verify(dataset)) == []
    other = run_units(recipe.model_copy(update={"dataset": str(fresh)}))
    assert dataset.statistics().tokens() == other.statistics().tokens()
    return dataset_hash(dataset) == dataset_hash(other)


def text_recipe(folder: Path, *overrides: str, **inputs: str) -> TokenizeRecipe:
    """A folder of texts by name, and the cheapest recipe over it: at most three inputs a unit."""
    recipe = {
        "dataset": str(folder / "tokens"),
        "sources": [{"name": "texts", "reader": "media_folder", "path": str(folder / "texts")}],
        "tokenizers": {"text": {"model": str(text_tokenizer(folder / "text.model"))}},
        "sequence_length": 256,
        "error_budget": 1.0,
        "units": {"inputs": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, text in (inputs or {f"t{n}": f"the quick fox {n}" for n in range(10)}).items():
        write_text(folder, name, text)
    return read_recipe(TokenizeRecipe, folder / "recipe.yaml", overrides)


def write_text(folder: Path, name: str, text: str | bytes) -> None:
    """An input of `text_recipe`; bytes that are not UTF-8 are rejected by the reader."""
    path = folder / "texts" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def remove_text(folder: Path, name: str) -> None:
    (folder / "texts" / f"{name}.txt").unlink()


def stored(dataset: Dataset) -> set[str]:
    """The inputs that have rows; twice in the dataset is an error."""
    sources = [row for batch in dataset.read(["source"]) for row in batch["source"].to_pylist()]
    assert len(sources) == len(set(sources)) == dataset.statistics().documents
    return {source.rpartition("/")[2] for source in sources}
