"""Two jobs on one dataset at once, in processes of their own: nothing lost, nothing doubled, and each sees the other."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.recipe import read_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.verify import verify
from pipelines.tokenize.job import open_or_create
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Request, plan
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.corpora import make_dataset, random_row, write_unit
from tests.pipelines.jobs import like_fresh, run_units, stored, text_recipe, write_text

ROUNDS = 3


def _job(folder: str, barrier: Any, name: str) -> int:
    """Rounds of a change to the corpus, a plan of all that is new to the dataset, and a commit for each unit."""
    recipe = read_recipe(TokenizeRecipe, f"{folder}/recipe.yaml")
    worker = UnitWorker(recipe)
    dataset = open_or_create(recipe, worker.vocabulary)
    ledger = Ledger(dataset.storage)
    committed = 0
    for index in range(ROUNDS):
        for n in range(3):
            write_text(Path(folder), f"{name}{index}{n}", f"the lazy dog of {name} in round {index}, {n}")
        write_text(Path(folder), f"t{index}", f"the fox as {name} has it in round {index}")
        barrier.wait(60)
        work = plan(dataset, ledger, recipe.sources, recipe.units, Request(retry=bool(index % 2)))
        # Both have planned before either commits, and neither is far ahead: from both ends of the same units.
        barrier.wait(60)
        for n, unit in enumerate(work.pending[:: 1 if name == "a" else -1]):
            committed += len(dataset.commit([worker.run(unit)], ancestors=ledger.ancestors))
            if n == 0:
                barrier.wait(60)
        barrier.wait(60)
    return committed


@pytest.mark.slow
def test_two_jobs_leave_what_one_undisturbed_run_would(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    write_text(tmp_path, "t9", b"caf\xe9")
    # "spawn", because deltalake's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        job: Callable[[str], int] = partial(_job, str(tmp_path), manager.Barrier(2))
        committed = list(pool.map(job, "ab"))
    assert min(committed) > 0
    dataset = Dataset.open(recipe.dataset)
    assert list(verify(dataset)) == []
    assert like_fresh(recipe, tmp_path)
    assert len(stored(Dataset.open(recipe.dataset))) == 9 + 2 * 3 * ROUNDS


def test_a_handle_that_follows_the_log_knows_what_a_fresh_one_reads(tmp_path: Path) -> None:
    follower = make_dataset(tmp_path / "d", units=2)
    assert len(follower.units) == 2
    other = Dataset.open(tmp_path / "d")
    rng = np.random.default_rng(0)
    for n in range(2, 12):
        gone = {f"u{n - 2}"} if n % 3 else set()
        shards = [write_unit(other, f"u{n}", [random_row(f"{n}y", rng)])]
        other.commit(shards, ancestors=lambda units, n=n, gone=gone: gone if f"u{n}" in units else set())
        if n % 4 == 0:
            follower.refresh()
            assert follower.shards() == Dataset.open(tmp_path / "d").shards()
            assert set(follower.units) == {shard.unit for shard in follower.shards()}
    # Its own commit, after others that it has not seen.
    (mine,) = follower.commit([write_unit(follower, "mine", [random_row("mine", rng)])])
    fresh = Dataset.open(tmp_path / "d")
    assert follower.shards() == fresh.shards()
    assert mine.name in fresh.names
    assert follower.statistics().to_json() == fresh.statistics().to_json()
    counted = sum(shard.rows for shard in fresh.shards())
    assert fresh.statistics().documents == counted


def test_a_commit_reads_no_shard_and_no_log_but_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's cost of a unit does not grow with the units before it."""
    recipe = text_recipe(tmp_path)
    dataset = run_units(recipe, each=True)
    ledger = Ledger(dataset.storage)
    write_text(tmp_path, "n0", "the fox")
    write_text(tmp_path, "n1", "the dog")
    worker = UnitWorker(recipe)
    work = plan(dataset, ledger, recipe.sources, recipe.units.model_copy(update={"inputs": 1}))
    first, second = (worker.run(unit) for unit in work.pending)
    dataset.commit([first], ancestors=ledger.ancestors)
    opened: list[str] = []
    real = type(dataset.storage).open

    def spy(storage: Any, name: str) -> Any:
        opened.append(storage.path(name).removeprefix(recipe.dataset + "/"))
        return real(storage, name)

    monkeypatch.setattr(type(dataset.storage), "open", spy)
    dataset.commit([second], ancestors=ledger.ancestors)
    assert opened == [
        f"statistics/{dataset.version - 1:020d}.json",
        f"shards/_delta_log/{dataset.version:020d}.json",
    ]
