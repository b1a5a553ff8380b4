"""The plan and the ledger: an input keeps its unit for ever, whatever happens to corpus, jobs and files in between."""

import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.corpus.documents import Input, Slice
from pipelines.recipe import RecipeError
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.storage import Storage
from pipelines.tokenize import history, ledger
from pipelines.tokenize.history import last_settings, record_recipe
from pipelines.tokenize.job import open_or_create
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Request
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.jobs import make_plan, remove_text, run_units, stored, text_recipe, write_text

STEPS = ["add", "change", "reject", "delete", "plan", "run", "half", "retire", "retry", "lose ledger"]


@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 7)), max_size=12))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_a_corpus_and_its_runs_went_the_end_is_that_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    recipe = text_recipe(folder, t0="the quick fox", t1="the lazy dog")
    force = {"force": True}
    for index, (step, n) in enumerate([*steps, ("retire", 0)]):
        here = sorted(path.stem for path in (folder / "texts").iterdir())
        match step:
            case "add":
                write_text(folder, f"n{index}", f"the fox number {index}")
            case "change":
                write_text(folder, here[n % len(here)], f"changed by step {index}")
            case "reject":
                write_text(folder, here[n % len(here)], b"caf\xe9" + str(index).encode())
            case "delete" if len(here) > 1:
                remove_text(folder, here[n % len(here)])
            case "plan":
                make_plan(recipe)
            case "run":
                run_units(recipe, each=bool(n % 2))
            case "half":
                _run_first(recipe, n)
            case "retire":
                run_units(recipe, Request(retire_missing=True, **force))
            case "retry":
                run_units(recipe, Request(retry=True))
            case "lose ledger" if Dataset.exists(recipe.dataset):
                # What was planned and not done goes with it; what was done is in the shards.
                shutil.rmtree(Path(recipe.dataset) / "inputs", ignore_errors=True)
    dataset = Dataset.open(recipe.dataset)
    fresh = run_units(recipe.model_copy(update={"dataset": str(folder / "fresh")}))
    assert stored(dataset) == stored(fresh)
    assert dataset_hash(dataset) == dataset_hash(fresh)
    assert dataset.rejects() == fresh.rejects()
    figures, expected = dataset.statistics().to_json(), fresh.statistics().to_json()
    assert dataset.statistics().distinct_documents >= fresh.statistics().distinct_documents
    assert figures | {"distinct_registers": ""} == expected | {"distinct_registers": ""}


def _run_first(recipe, n: int) -> None:  # type: ignore[no-untyped-def]
    """A job that was killed after the commit of its first units that may be committed alone."""
    work = make_plan(recipe)
    dataset = Dataset.open(recipe.dataset)
    alone = [unit for unit in work.pending if [u.replaces for u in work.pending].count(unit.replaces) == 1]
    worker = UnitWorker(recipe)
    done = [worker.run(unit) for unit in alone[: n % 3]]
    dataset.commit(done, ancestors=Ledger(dataset.storage).ancestors)


def test_many_small_files_of_the_ledger_are_merged_and_mean_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_SMALL_FILES", 4)
    recipe = text_recipe(tmp_path, t0="the quick fox")
    for n in range(9):
        write_text(tmp_path, f"n{n}", "the lazy dog")
        write_text(tmp_path, "t0", f"the quick fox {n}")
        units = run_units(recipe).units
    book = Ledger(Storage.of(recipe.dataset))
    assert len(book._files) < 8
    assert units <= book.known
    (current,) = (unit for unit in book.units(book.known) if unit.id in units and unit.replaces)
    before = {unit.id: unit for unit in book.units(book.known)}
    chain = book.ancestors([current.id])
    assert len(chain) == 8
    # A handle of before the merge reads on; a job that writes while another merges does not lose what it wrote.
    reader, writer, merger = (Ledger(Storage.of(recipe.dataset)) for _ in range(3))
    monkeypatch.setattr(ledger, "_SMALL_FILES", 2)
    merger.compact()
    new = WorkUnit(source="texts", slices=(_whole("late"),))
    assert not writer.append([new])
    writer.refresh()
    assert writer.append([new])
    reader.refresh()
    assert {unit.id: unit for unit in reader.units(reader.known)} == before | {new.id: new}
    assert reader.ancestors([current.id]) == chain
    assert len(reader._files) == 2


def test_a_unit_is_read_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over row groups of a few rows, so that units begin and end inside them."""
    monkeypatch.setattr(ledger, "_GROUP_ROWS", 3)
    book = Ledger(Storage.of(tmp_path))
    units = [
        WorkUnit(
            source=f"s{n % 3}",
            slices=tuple(_whole(f"u{n}i{i}") for i in range(n % 5)),
            replaces=tuple(f"r{n}{i}" for i in range(n % 4)),
        )
        for n in range(20)
    ]
    for start in range(0, 20, 7):
        assert book.append(units[start : start + 7])
        book.refresh()
    for n in (1, 3, 20):
        asked = units[::n]
        found = {unit.id: unit for unit in Ledger(Storage.of(tmp_path)).units([unit.id for unit in asked])}
        assert found == {unit.id: unit for unit in asked}
    assert book.replaces == {unit.id: unit.replaces for unit in units if unit.replaces}


def _whole(uri: str) -> Slice:
    return Slice(input=Input(uri=uri, size=3, etag="e", parts=(f"/{uri}", "/p"), divisible=True), start=0, stop=3)


def test_what_recipes_say_of_sources_is_remembered_however_the_memory_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = text_recipe(tmp_path)
    storage = Storage.of(recipe.dataset)
    first = {"path": str(tmp_path / "first")}
    source = recipe.sources[0]
    record_recipe(storage, recipe.model_copy(update={"sources": [source.model_copy(update=first)]}))
    memory = (tmp_path / "tokens" / "sources.json").read_bytes()
    record_recipe(storage, recipe)
    assert last_settings(storage)["texts"]["path"] == source.path
    # Another job wrote its own, older memory over ours.
    (tmp_path / "tokens" / "sources.json").write_bytes(memory)
    assert last_settings(storage)["texts"]["path"] == source.path
    (tmp_path / "tokens" / "sources.json").unlink()
    assert last_settings(storage)["texts"]["path"] == source.path
    # And nothing is parsed again that was taken in.
    record_recipe(storage, recipe)
    monkeypatch.setattr(history.yaml, "load", lambda *_: pytest.fail("read again"))
    assert last_settings(storage)["texts"]["path"] == source.path


def test_a_setting_that_earlier_recipes_did_not_have_counts_as_its_default(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    (file,) = (tmp_path / "tokens" / "recipes").iterdir()
    (tmp_path / "tokens" / "sources.json").unlink()
    values = yaml.safe_load(file.read_text())
    del values["sources"][0]["seed"]
    file.write_text(yaml.safe_dump(values))
    vocabulary = UnitWorker(recipe).vocabulary
    open_or_create(recipe, vocabulary)
    other = recipe.sources[0].model_copy(update={"seed": 5})
    with pytest.raises(RecipeError, match="texts: seed = 5, but this dataset has rows of that source made with 0"):
        open_or_create(recipe.model_copy(update={"sources": [other]}), vocabulary)
