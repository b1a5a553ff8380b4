"""What is no longer listed leaves on request, and what was rejected is tried again on request; nothing else changes."""

import shutil
from pathlib import Path

import pytest

from pipelines.corpus.errors import CorpusError
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.tokenize.estimate import estimate, render
from pipelines.tokenize.job import Finished, tokenize
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Request
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.jobs import like_fresh, make_plan, remove_text, run_units, stored, text_recipe, write_text

RETIRE = Request(retire_missing=True)
NOT_TEXT = b"caf\xe9"


def test_missing_inputs_stay_until_their_retirement_is_asked_for(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    # One of a unit of three, and all of another unit.
    for name in ("t1", "t3", "t4", "t5"):
        remove_text(tmp_path, name)
    assert len(stored(run_units(recipe))) == 10
    before = Dataset.open(recipe.dataset).version
    assert like_fresh(recipe, tmp_path, RETIRE)
    dataset = Dataset.open(recipe.dataset)
    assert stored(dataset) == {"t0", "t2", "t6", "t7", "t8", "t9"}
    assert dataset.version == before + 1, "one commit"
    assert make_plan(recipe, RETIRE).pending == []
    assert len(stored(Dataset.open(recipe.dataset, before))) == 10


def test_retired_inputs_that_come_back_are_done_again(tmp_path: Path) -> None:
    """The same files with the same stamps, alone and together: their units have been there before."""
    recipe = text_recipe(tmp_path, "units.inputs=2")
    run_units(recipe)
    texts, away = tmp_path / "texts", tmp_path / "away"
    for names in (("t2", "t3"), ("t3",), ("t2", "t3", "t4"), ("t2", "t3")):
        away.mkdir(exist_ok=True)
        for name in names:
            (texts / f"{name}.txt").rename(away / f"{name}.txt")
        assert like_fresh(recipe, tmp_path, RETIRE)
        for name in names:
            (away / f"{name}.txt").rename(texts / f"{name}.txt")
        assert like_fresh(recipe, tmp_path)
    assert len(stored(Dataset.open(recipe.dataset))) == 10


def test_a_slow_job_does_not_bring_retired_rows_back(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    for name in ("u0", "u1"):
        write_text(tmp_path, name, f"the lazy dog {name}")
    slow = [UnitWorker(recipe).run(unit) for unit in make_plan(recipe).pending]
    remove_text(tmp_path, "u0")
    remove_text(tmp_path, "u1")
    dataset = run_units(recipe, RETIRE)
    assert dataset.commit(slow, ancestors=Ledger(dataset.storage).ancestors) == []
    assert len(stored(Dataset.open(recipe.dataset))) == 10


def test_a_retirement_that_was_killed_is_finished_by_the_next_run(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    for name in ("t1", "t3", "t4", "t5"):
        remove_text(tmp_path, name)
    make_plan(recipe, RETIRE)
    assert like_fresh(recipe, tmp_path)


def test_retired_units_are_committed_all_at_once(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    for name in ("t1", "t3", "t7"):
        remove_text(tmp_path, name)
    write_text(tmp_path, "new", "the lazy dog")
    work = make_plan(recipe, RETIRE)
    worker, finished = UnitWorker(recipe), Finished(work)
    retired = [unit for unit in work.pending if unit.id in work.together]
    assert len(work.pending) == 4
    assert len(retired) == 3
    for unit in retired[:-1]:
        finished.add(unit, worker.run(unit))
        assert finished.take() == []
    (new,) = (unit for unit in work.pending if unit.id not in work.together)
    finished.add(new, worker.run(new))
    assert len(finished.take()) == 1, "what is new waits for nobody"
    finished.add(retired[-1], worker.run(retired[-1]))
    assert len(finished.take()) == 3


def test_a_wrong_mount_does_not_empty_a_dataset(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    run_units(recipe)
    for n in range(6):
        remove_text(tmp_path, f"t{n}")
    with pytest.raises(CorpusError, match=r"texts: 6 of its 10 known inputs are no longer listed, such as t0.*--force"):
        run_units(recipe, RETIRE)
    assert stored(Dataset.open(recipe.dataset)) == {f"t{n}" for n in range(10)}
    assert stored(run_units(recipe, Request(retire_missing=True, force=True))) == {f"t{n}" for n in range(6, 10)}


def test_a_dry_run_says_what_would_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    recipe = text_recipe(tmp_path)
    run_units(recipe)
    remove_text(tmp_path, "t1")
    files = sorted(path.name for path in Path(recipe.dataset).rglob("*"))
    for request, fate in {Request(): "stay, unless --retire-missing", RETIRE: "go"}.items():
        render(estimate(recipe, request), Console(width=200), 1)
        assert f"texts: 1 inputs are no longer there, such as t1; their rows {fate}" in capsys.readouterr().out
    assert files == sorted(path.name for path in Path(recipe.dataset).rglob("*"))


def test_rejects_are_tried_again_without_doubling_a_row(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    write_text(tmp_path, "t4", NOT_TEXT)
    write_text(tmp_path, "t9", "\u200b")
    first = run_units(recipe)
    assert first.rejects() == 2
    # The fault passes while the file's stamp stays: as of a limit of the machine, or of a network disk.
    state = (tmp_path / "texts" / "t4.txt").stat()
    _mend(tmp_path / "texts" / "t4.txt", state.st_mtime_ns)
    assert run_units(recipe).version == first.version
    again = run_units(recipe, Request(retry=True, reasons=("text: not UTF-8",)))
    assert stored(again) == {f"t{n}" for n in range(9)}
    assert [row["reason"] for row in again.quarantined()] == ["text: empty"]
    assert again.quarantined(["text: not UTF-8"]) == []
    fresh = run_units(recipe.model_copy(update={"dataset": str(tmp_path / "fresh")}))
    assert dataset_hash(again) == dataset_hash(fresh)
    # Tried again and again, the same units never have the same id.
    ids = set()
    for _ in range(3):
        dataset = run_units(recipe, Request(retry=True))
        (unit,) = dataset.rejected_units()
        ids.add(unit)
        assert dataset_hash(dataset) == dataset_hash(fresh)
    assert len(ids) == 3
    assert len(Ledger(again.storage).known) == 4 + 1 + 3


def _mend(path: Path, mtime_ns: int) -> None:
    """Other bytes of the same length and time: what no stamp can see."""
    import os

    path.write_bytes(b"cafe"[: path.stat().st_size])
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_units_whose_inputs_are_gone_are_not_tried_again(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    write_text(tmp_path, "t9", NOT_TEXT)
    run_units(recipe)
    remove_text(tmp_path, "t9")
    assert make_plan(recipe, Request(retry=True)).pending == []


@pytest.mark.slow
def test_the_whole_job_retires_and_retries(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    write_text(tmp_path, "t4", NOT_TEXT)
    assert tokenize(recipe).rejects == 1
    remove_text(tmp_path, "t0")
    assert tokenize(recipe, request=RETIRE).units == 1
    assert stored(Dataset.open(recipe.dataset)) == {f"t{n}" for n in (1, 2, 3, 5, 6, 7, 8, 9)}
    summary = tokenize(recipe, request=Request(retry=True))
    assert (summary.units, summary.rejects) == (1, 1)
    shutil.rmtree(tmp_path / "texts")
    with pytest.raises(CorpusError):
        tokenize(recipe, request=Request(retire_missing=True, force=True))
