"""The tokenize job: what goes in comes out once, whatever happens in between."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus.errors import CorpusError
from pipelines.recipe import RecipeError, read_recipe
from pipelines.sequence import VocabularyError, parse
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.show import show
from pipelines.tokenize.estimate import estimate
from pipelines.tokenize.job import Finished, JobError, tokenize
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.jobs import like_fresh, make_plan, run_units
from tests.pipelines.tiny import image_tokenizer, tiny_recipe, write_corpus, write_recipe, write_stamp


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenizeRecipe, Dataset]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("job"))
    summary = tokenize(recipe)
    assert summary.documents == 42
    return recipe, Dataset.open(recipe.dataset)


def test_the_ray_job_gives_the_rows_that_the_plain_callable_gives(
    done: tuple[TokenizeRecipe, Dataset], tmp_path: Path
) -> None:
    recipe, dataset = done
    alone = recipe.model_copy(update={"dataset": str(tmp_path / "alone")})
    assert dataset_hash(run_units(alone)) == dataset_hash(dataset)


def test_every_row_is_a_document_of_the_grammar(done: tuple[TokenizeRecipe, Dataset]) -> None:
    _, dataset = done
    sources = set()
    for batch in dataset.read():
        for row in batch.to_pylist():
            spans = parse(
                dataset.vocabulary, np.array(row["token_ids"], np.int32), np.array(row["modality_ids"], np.int8)
            )
            assert len(spans) == len(row["spans"])
            sources.add(row["source"].partition("/")[0])
    assert sources == {"stamps", "lines"}


def test_a_long_sound_becomes_spans_of_about_equal_length(done: tuple[TokenizeRecipe, Dataset]) -> None:
    """The tiny recipe allows 40 frames of 80 samples a span; the corpus has sounds of up to 60 frames."""
    _, dataset = done
    several = 0
    for batch in dataset.read(["spans"]):
        for spans in batch.column("spans").to_pylist():
            frames = [span["rows"] for span in spans if span["modality"] == 2]
            several += len(frames) > 1
            assert all(count <= 40 for count in frames)
            assert not frames or max(frames) - min(frames) <= len(frames)
    assert several


def test_a_second_run_has_nothing_to_do(done: tuple[TokenizeRecipe, Dataset]) -> None:
    recipe, dataset = done
    summary = tokenize(recipe)
    assert (summary.units, summary.already_done, summary.version) == (0, len(dataset.shards()), dataset.version)


def test_a_row_is_shown_as_text_picture_and_sound(done: tuple[TokenizeRecipe, Dataset], tmp_path: Path) -> None:
    _, dataset = done
    ids = [row for batch in dataset.read(["row_id", "num_audio"]) for row in batch.to_pylist()]
    row = next(r["row_id"] for r in ids if r["num_audio"])
    (shown,) = show(dataset, [row[:16]], tmp_path / "out")
    assert {path.suffix for path in shown.files if path} == {".png", ".txt", ".wav"}
    assert any(span.text and span.text.startswith("the fox s") for span in shown.spans)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    estimates, work = estimate(recipe)
    assert work.done == 0
    assert 8 <= estimates["stamps"].documents <= 16
    assert 20 <= estimates["lines"].documents <= 40
    assert not Path(recipe.dataset).exists()


def test_new_files_make_new_units_and_known_ones_stay(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    before = {shard.name for shard in run_units(recipe).shards()}
    rng = np.random.default_rng(9)
    for stem in ("a-first", "s001b", "zz-last"):
        write_stamp(tmp_path / "stamps", stem, rng)
    after = {shard.name for shard in run_units(recipe).shards()}
    assert before < after
    assert Dataset.open(recipe.dataset).statistics().documents == 45


def test_a_changed_file_replaces_its_rows_in_one_version(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    first = run_units(recipe)
    caption = tmp_path / "stamps" / "s003.txt"
    caption.write_text("the cat s003 is new now")
    # And again before the change was worked off: the unit in between is never done.
    make_plan(recipe)
    caption.write_text("the cat s003 is newer still")
    second = run_units(recipe)
    assert second.version == first.version + 1
    assert second.statistics().documents == 42
    fresh = recipe.model_copy(update={"dataset": str(tmp_path / "fresh")})
    assert dataset_hash(second) == dataset_hash(run_units(fresh))


def test_a_corpus_that_moved_while_units_were_pending_is_found(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    make_plan(recipe)
    (tmp_path / "stamps").rename(tmp_path / "moved")
    sources = [recipe.sources[0].model_copy(update={"path": str(tmp_path / "moved")}), recipe.sources[1]]
    dataset = run_units(recipe.model_copy(update={"sources": sources}))
    assert dataset.statistics().documents == 42


def test_a_lost_ledger_is_made_again_from_the_shards(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run_units(recipe)
    caption = tmp_path / "stamps" / "s003.txt"
    caption.write_text("the cat s003 is new now")
    version = run_units(recipe).version
    shutil.rmtree(Path(recipe.dataset) / "inputs")
    assert run_units(recipe).version == version
    shutil.rmtree(Path(recipe.dataset) / "inputs")
    caption.write_text("and the cat is new once more")
    assert like_fresh(recipe, tmp_path)


def test_a_file_of_lines_may_shrink_and_grow_and_grow_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    lines = tmp_path / "lines.jsonl"
    whole = lines.read_bytes()
    for content in (whole, whole[: whole.index(b"\n", 300) + 1], whole, whole * 3, b"", whole):
        lines.write_bytes(content)
        assert like_fresh(recipe, tmp_path)
        ledger = Ledger(Dataset.open(recipe.dataset).storage)
        units = ledger.units(ledger.known)
        assert all(unit.size <= recipe.units.bytes for unit in units if unit.source == "lines")


def test_of_two_jobs_that_saw_a_file_in_two_states_the_later_state_stays(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run_units(recipe)
    worker = UnitWorker(recipe)
    jobs = []
    for state in ("second", "third"):
        (tmp_path / "stamps" / "s003.txt").write_text(f"the cat in its {state} state")
        (unit,) = make_plan(recipe).pending
        jobs.append(worker.run(unit))
    for order in (jobs, jobs[::-1]):
        copy = tmp_path / f"copy{order is jobs}"
        shutil.copytree(recipe.dataset, copy)
        for shard in order:
            dataset = Dataset.open(copy)
            dataset.commit([shard], ancestors=Ledger(dataset.storage).ancestors)
        assert like_fresh(recipe.model_copy(update={"dataset": str(copy)}), tmp_path)


def test_all_that_replaces_the_same_units_is_committed_together(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run_units(recipe)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(reversed(lines.read_text().splitlines(keepends=True))))
    work = make_plan(recipe)
    assert len(work.pending) > 2
    worker, finished = UnitWorker(recipe), Finished(work)
    for unit in work.pending[:-1]:
        finished.add(unit, worker.run(unit))
        assert finished.take() == []
    finished.add(work.pending[-1], worker.run(work.pending[-1]))
    assert len(finished.take()) == len(work.pending)


def test_a_deleted_file_leaves_with_the_unit_it_was_in(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "units.bytes=100000")
    run_units(recipe)
    for file in (tmp_path / "stamps").glob("s004.*"):
        file.unlink()
    assert run_units(recipe).statistics().documents == 42
    (tmp_path / "stamps" / "s003.txt").write_text("a neighbour of the deleted one has changed")
    dataset = run_units(recipe)
    assert (dataset.statistics().documents, dataset.quarantined()) == (41, [])


def test_records_of_one_identity_and_texts_of_nothing_go_to_quarantine(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "sources.1.id_field=id")
    (tmp_path / "lines.jsonl").write_text(
        '{"id": 1, "text": "the fox"}\n{"id": 1, "text": "the other fox"}\n{"id": 2, "text": "\\u200b"}\n'
    )
    dataset = run_units(recipe)
    reasons = {row["source"]: row["reason"] for row in dataset.quarantined()}
    assert reasons == {"lines/lines.jsonl#1": "row id: twice", "lines/lines.jsonl#2": "text: empty"}
    assert dataset.statistics().documents == 13


def test_a_reader_s_limits_may_be_raised_and_its_rows_not_be_changed(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    tokenize(recipe)
    lines = recipe.sources[1]
    raised = lines.model_copy(update={"max_line_mb": 7.0})
    assert tokenize(recipe.model_copy(update={"sources": [recipe.sources[0], raised]})).units == 0
    with pytest.raises(RecipeError, match="sources: lines: text_field = 'body', but this dataset has rows"):
        tokenize(recipe.model_copy(update={"sources": [lines.model_copy(update={"text_field": "body"})]}))


def test_tokenizers_named_by_relative_paths_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = recipe.tokenizers.text.model_copy(update={"model": "text.model"})
    recipe = recipe.model_copy(update={"tokenizers": recipe.tokenizers.model_copy(update={"text": text})})
    tokenize(recipe)
    monkeypatch.chdir("/")
    assert next(iter(show(Dataset.open(recipe.dataset), ["0"]))).spans


def test_what_cannot_be_read_goes_to_quarantine_with_its_reason(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    stamps = tmp_path / "stamps"
    (stamps / "s000.png").write_bytes((stamps / "s000.png").read_bytes()[:60])
    (stamps / "s001.wav").write_bytes(b"")
    (stamps / "s002.txt").write_bytes(b"caf\xe9")
    with (tmp_path / "lines.jsonl").open("ab") as file:
        file.write(b'{"text": 3}\nnot json\n{"text": "\xff"}\n')
    dataset = run_units(recipe)
    rejected = {row["source"]: row["reason"] for row in dataset.quarantined()}
    assert rejected["stamps/s000"] == "image: damaged"
    assert rejected["stamps/s001"] == "audio: empty file"
    assert rejected["stamps/s002"] == "text: not UTF-8"
    assert len(rejected) == 6
    assert dataset.statistics().documents == 39


def test_a_spent_error_budget_ends_the_job_and_keeps_what_is_done(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "error_budget=0.05")
    for index in range(6):
        (tmp_path / "stamps" / f"s{index:03}.png").write_bytes(b"no picture")
    with pytest.raises(
        JobError, match=r"6 of 42 documents \(14.3%\) could not be tokenized, over the error_budget of 5.0%"
    ):
        tokenize(recipe)
    assert Dataset.open(recipe.dataset).statistics().documents == 36
    # The budget is the dataset's: trying again does not make it larger.
    with pytest.raises(JobError, match="6 of 42 documents"):
        tokenize(recipe)


def test_a_dataset_made_otherwise_is_refused_naming_what_differs(
    done: tuple[TokenizeRecipe, Dataset], tmp_path: Path
) -> None:
    recipe, _ = done
    other = image_tokenizer(tmp_path / "other", seed=1)
    image = recipe.tokenizers.image
    assert image
    changed = recipe.model_copy(
        update={
            "tokenizers": recipe.tokenizers.model_copy(
                update={"image": image.model_copy(update={"checkpoint": str(other)})}
            )
        }
    )
    with pytest.raises(VocabularyError, match="image_sha256: "):
        tokenize(changed)
    with pytest.raises(RecipeError, match="sources: stamps: seed = 5, but this dataset has rows"):
        tokenize(recipe.model_copy(update={"sources": [recipe.sources[0].model_copy(update={"seed": 5})]}))
    with pytest.raises(RecipeError, match=r"validation_share = 0.5: dataset .* was made with 0.2"):
        tokenize(recipe.model_copy(update={"validation_share": 0.5}))


def test_a_missing_or_empty_corpus_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    file = write_recipe(tmp_path)
    for override, message in {
        f"sources.0.path={tmp_path}/nowhere": "nowhere",
        f"sources.0.path={tmp_path}/empty": "empty",
    }.items():
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CorpusError, match=message):
            run_units(read_recipe(TokenizeRecipe, file, [override]))


def test_media_that_cannot_fit_the_sequence_are_refused_before_any_work(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    file = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="16 x 16 codes and 5 special tokens do not fit sequence_length 256"):
        read_recipe(TokenizeRecipe, file, ["tokenizers.image.rows=16", "tokenizers.image.columns=16"])
    with pytest.raises(RecipeError, match="set at most 125"):
        read_recipe(TokenizeRecipe, file, ["tokenizers.audio.max_frames=126"])


def test_a_driver_killed_in_the_middle_leaves_nothing_doubled_or_lost(tmp_path: Path) -> None:
    """kill -9 while units are done and others are not; the same command again; the undisturbed run's hash."""
    write_corpus(tmp_path, stamps=60)
    file = write_recipe(tmp_path)
    command = [sys.executable, "-m", "pipelines.cli", "tokenize", str(file)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tokens = tmp_path / "tokens"
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(tokens.glob("shards/*.parquet"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "the job ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if Dataset.exists(tokens):
        assert Dataset.open(tokens).statistics().documents < 90
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "new documents" in again.stdout
    undisturbed = read_recipe(TokenizeRecipe, file, [f"dataset={tmp_path}/undisturbed"])
    assert dataset_hash(Dataset.open(tokens)) == dataset_hash(run_units(undisturbed))
