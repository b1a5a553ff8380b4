"""Duplicates: where they are to be dropped, training reads each content once, and always the same copy of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.loading import Index, Loader, StepBatch
from pipelines.loading.duplicates import copies
from pipelines.recipe import RecipeError
from pipelines.report.summary import summarize
from pipelines.shards import writer
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from tests.pipelines.corpora import VOCABULARY, random_row, write_unit
from tests.pipelines.test_tokenize import run_units
from tests.pipelines.tiny import tiny_recipe

T = 64


def twins(count: int, seed: int = 0) -> list[Row]:
    """Documents of which about every second has copies, in a random order, with row ids as jobs make them."""
    rng, order = np.random.default_rng(seed), random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        original = random_row("x", rng)
        for _ in range(order.choice([1, 1, 2, 4])):
            identity = rng.bytes(16).hex()
            rows.append(replace(original, row_id=identity, source=f"s/{identity}"))
    order.shuffle(rows)
    return rows


def commit(folder: Path, units: list[list[Row]], duplicates: str = "drop", validation_share: float = 0.0) -> Dataset:
    dataset = Dataset.create(folder, VOCABULARY, validation_share=validation_share, duplicates=duplicates)
    for number, rows in enumerate(units):
        dataset.commit([write_unit(dataset, f"u{number}", rows)])
    return Dataset.open(folder)


def kept(dataset: Dataset) -> set[str]:
    """Row ids of the documents in the index."""
    index = Index.build(dataset, T)
    stored = [row_id for batch in dataset.read(["row_id"]) for row_id in batch.column("row_id").to_pylist()]
    first = np.cumsum([0, *(block.rows for block in index.blocks)])
    documents = {int(first[block] + row) for block, row in zip(index.block, index.row, strict=True)}
    assert index.documents == len(documents)
    assert index.documents + index.duplicates == len(stored)
    return {stored[document] for document in documents}


def smallest(rows: list[Row]) -> set[str]:
    """Of each content the smallest row id."""
    found: dict[str, str] = {}
    for row in rows:
        found[row.content_hash] = min(row.row_id, found.get(row.content_hash, row.row_id))
    return set(found.values())


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 60), units=st.integers(1, 5), seed=st.integers(0, 99))
def test_of_each_content_the_smallest_row_id_is_kept_however_the_rows_were_committed(
    count: int, units: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = twins(count, seed)
    with pytest.MonkeyPatch.context() as patch:
        # Several row groups a shard.
        patch.setattr(writer, "ROW_GROUP_TOKENS", 200)
        dataset = commit(tmp_path_factory.mktemp("rows") / "d", [rows[unit::units] for unit in range(units)])
    assert kept(dataset) == smallest(rows)


def test_hashes_that_agree_in_their_first_half_are_no_duplicates(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one = random_row("x", rng)
    other = replace(random_row("x", rng), content_hash=one.content_hash[:16] + "0" * 16)
    rows = [replace(row, row_id=rng.bytes(16).hex()) for row in (one, other, other)]
    dataset = commit(tmp_path / "d", [rows])
    assert copies(dataset.storage, Index.build(dataset, T).blocks).sum() == 1
    assert kept(dataset) == smallest(rows)


def test_a_dataset_keeps_duplicates_unless_it_says_otherwise(tmp_path: Path) -> None:
    rows = twins(40)
    dataset = commit(tmp_path / "d", [rows], duplicates="keep")
    assert kept(dataset) == {row.row_id for row in rows}
    assert Dataset.create(tmp_path / "e", VOCABULARY, validation_share=0).duplicates == "keep"
    assert (summarize(dataset)["duplicates"], summarize(dataset)["documents"]) == ("keep", len(rows))


def test_a_copy_that_comes_later_takes_over_where_its_row_id_is_smaller(tmp_path: Path) -> None:
    row = random_row("x", np.random.default_rng(2))
    first, late = (replace(row, row_id=digit * 32, source=f"s/{digit}") for digit in "84")
    dataset = commit(tmp_path / "d", [[first]])
    assert kept(dataset) == {"8" * 32}
    dataset.commit([write_unit(dataset, "late", [late])])
    assert kept(Dataset.open(tmp_path / "d")) == {"4" * 32}
    assert kept(Dataset.open(tmp_path / "d", version=1)) == {"8" * 32}, "a version stays as it was"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rows = twins(150, seed=5)
    return commit(tmp_path_factory.mktemp("loader") / "d", [rows[::2], rows[1::2]], validation_share=0.2)


def loader(index: Index, **changes: object) -> Loader:
    arguments: dict[str, object] = {"sequences": 4, "micro_batch": 2, "seed": 1, "window_tokens": 2000}
    return Loader(index, **(arguments | changes))  # type: ignore[arg-type]


def documents_of(step: StepBatch) -> Counter[bytes]:
    """What lies between the marks of documents in the packed sequences of a step."""
    found: Counter[bytes] = Counter()
    for batch in step.micro_batches:
        bounds = batch.cu_seqlens.unique().tolist()
        ids = batch.token_ids.flatten().numpy()
        pieces = [ids[a:b] for a, b in pairwise(bounds)]
        found.update(piece.tobytes() for piece in pieces if piece[0] == VOCABULARY.document)
    return found


def test_an_epoch_holds_each_content_once_and_in_one_split_alone(dataset: Dataset) -> None:
    index = Index.build(dataset, 128)
    train, validation = (index.split(validation=split) for split in (False, True))
    found: Counter[bytes] = Counter()
    for part in (train, validation):
        assert part.documents > 5
        for step in loader(part, endless=False):
            found += documents_of(step)
    assert set(found.values()) == {1}
    hashes = {h for batch in dataset.read(["content_hash"]) for h in batch.column("content_hash").to_pylist()}
    assert len(found) == len(hashes) == train.documents + validation.documents


@pytest.mark.parametrize("ranks", [1, 4])
def test_batches_do_not_depend_on_the_ranks_and_go_on_with_others(dataset: Dataset, ranks: int) -> None:
    index = Index.build(dataset, 128).split(validation=False)
    whole = loader(index, sequences=8, micro_batch=8)
    parts = [loader(index, sequences=8, micro_batch=2, rank=r, world_size=ranks) for r in range(ranks)]
    for n in range(9):
        expected = next(whole).micro_batches[0].token_ids.numpy()
        got = np.concatenate([b.token_ids.numpy() for part in parts for b in next(part).micro_batches])
        assert np.array_equal(got, expected)
        if n == 4:
            state = parts[0].state_dict()
            # Another rank reads the dataset anew.
            again = Index.build(Dataset.open(dataset.uri), 128).split(validation=False)
            parts = [loader(again, sequences=8, micro_batch=1, rank=r, world_size=2) for r in range(2)]
            for part in parts:
                part.load_state_dict(state)
    assert next(whole).after.streams.popitem()[1].epoch > 0


def test_what_a_recipe_says_of_duplicates_is_fixed_when_the_dataset_is_made(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "duplicates=drop")
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(lines.read_bytes() * 2)
    made = run_units(recipe)
    assert made.duplicates == "drop"
    index = Index.build(made, recipe.sequence_length)
    assert (index.documents, index.duplicates, made.statistics().documents) == (42, 30, 72)
    with pytest.raises(RecipeError, match=r"duplicates = keep: dataset .* was made with drop"):
        run_units(recipe.model_copy(update={"duplicates": "keep"}))
