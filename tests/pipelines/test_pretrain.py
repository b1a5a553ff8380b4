"""Pretraining, on real runs of a tiny model: what a run leaves, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import MODALITIES
from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.export import load_model
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import drop_after, read_metrics
from pipelines.pretrain.plan import config_of, make_plan
from pipelines.pretrain.run import RunError, RunResult
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import VOCABULARY
from tests.pipelines.training import (
    losses_of,
    run_recipe,
    torch_weights,
    trained,
    unfinished,
)


def test_a_run_leaves_metrics_checkpoints_and_a_model(dataset: Dataset, finished: RunResult) -> None:
    train = read_metrics(finished.folder / "metrics.jsonl", "train")
    assert [r["step"] for r in train] == list(range(1, 13))
    assert set(train[0]["loss"]) == {"text", "image", "audio"}
    assert train[0].keys() >= {"learning_rate", "gradient_norm", "tokens_per_s", "padding_share", "data_wait_share"}
    telemetry = read_metrics(finished.folder / "metrics.jsonl", "telemetry")
    norms = [r["gradient_norm"] for r in telemetry if "gradient_norm" in r]
    assert len(norms) == 6
    assert all(set(r["head"]) == {"image", "audio"} and set(r["embedding"]) == set(MODALITIES) for r in norms)
    assert all(0 < norm < 100 for r in norms for part in r.values() for norm in part.values())
    assert all(r["log_partition"]["text"] > 1 for r in telemetry if "log_partition" in r)
    assert [len(r["attention_logits"]) for r in telemetry if "attention_logits" in r] == [2, 2]
    assert all(0 <= r["padding_share"] < 0.6 and r["tokens_per_s"] > 0 for r in train)
    assert [r["step"] for r in read_metrics(finished.folder / "metrics.jsonl", "validation")] == [6, 12]
    assert [p.name for p in list_checkpoints(finished.folder / "checkpoints")] == ["step-00000008", "step-00000012"]
    assert finished.validation is not None
    assert finished.validation.audio is not None
    assert len(finished.validation.audio_codebooks) == 2
    assert finished.resumed_from is None
    model, vocabulary, about = load_model(finished.folder)
    assert vocabulary == VOCABULARY
    assert about["step"] == 12
    assert about["dataset_version"] == dataset.version
    assert model.config.max_sequence_length == 96
    assert not model.training


def test_a_finished_run_is_left_alone(dataset: Dataset, finished: RunResult) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")}
    again = trained(run_recipe(dataset, finished.folder))
    assert again.already_finished
    assert again.validation == finished.validation
    assert again.baseline == finished.baseline
    assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")} == before


def test_a_finished_run_whose_model_is_gone_exports_it_again(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(folder / "model")
    again = trained(run_recipe(dataset, folder))
    assert (again.resumed_from, again.already_finished) == (12, False)
    assert again.validation == finished.validation
    assert torch_weights(folder) == torch_weights(finished.folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match="its model is gone and no checkpoint is left"):
        trained(run_recipe(dataset, folder))
    assert losses_of(folder) == losses_of(finished.folder)


def test_what_decides_nothing_may_change_between_calls(
    dataset: Dataset, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(dataset.uri).parent)
    recipe = run_recipe(
        Path(Path(dataset.uri).name),
        finished.folder,
        threads=2,
        logging={"every": 7, "tensorboard": True},
        checkpoints={"every": 3, "keep": 1},
        validation={"every": 5},
        memory_gib=80,
    )
    assert trained(recipe).already_finished


@pytest.mark.parametrize("end", ["finished", "unfinished"])
def test_another_length_is_refused_saying_what_to_do(
    dataset: Dataset, finished: RunResult, tmp_path: Path, end: str
) -> None:
    folder = finished.folder if end == "finished" else unfinished(finished, tmp_path)
    with pytest.raises(RunError, match=rf"steps: 12 there, 20 here\n.*new folder, or delete the folder {folder}"):
        trained(run_recipe(dataset, folder, steps=20))


def test_a_run_that_never_saved_gives_its_folder_to_a_corrected_recipe(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a number"):
        trained(run_recipe(dataset, tmp_path / "run", optimizer={"learning_rate": 1e30}, gradient_clip=1e30))
    assert trained(run_recipe(dataset, tmp_path / "run", steps=3)).steps == 3
    assert "learning_rate: 0.003" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_an_output_that_is_a_file_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    for output in (tmp_path / "notes", tmp_path / "notes" / "run"):
        with pytest.raises(RunError, match=rf"{tmp_path / 'notes'}: a file, where `output` = {output} needs a folder"):
            trained(run_recipe(dataset, output))


def test_a_truncated_end_of_a_run_is_named_with_its_remedy(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    end = folder / "finished.json"
    end.write_bytes(end.read_bytes()[:20])
    with pytest.raises(RunError, match=f"{end} is damaged; delete it"):
        trained(run_recipe(dataset, folder))
    end.unlink()
    assert trained(run_recipe(dataset, folder)).validation == finished.validation


@pytest.mark.parametrize("broken", [b'{"kind": "train", "st\n', b"\xff\xfe\n", b"[1]\n", b"\n"])
def test_a_broken_metrics_line_is_named_and_nothing_is_dropped(tmp_path: Path, broken: bytes) -> None:
    metrics = tmp_path / "metrics.jsonl"
    content = b'{"kind": "train", "step": 1}\n' + broken + b'{"kind": "train", "step": 2}\n'
    metrics.write_bytes(content)
    with pytest.raises(RunError, match=rf"{metrics}:2: damaged.*delete that line"):
        drop_after(metrics, 1)
    with pytest.raises(RunError, match=rf"{metrics}:2: damaged"):
        read_metrics(metrics, "train")
    assert metrics.read_bytes() == content


def test_another_recipe_in_the_folder_is_refused_naming_what_differs(dataset: Dataset, finished: RunResult) -> None:
    with pytest.raises(RunError, match=r"optimizer.learning_rate: 0.003 there, 0.1 here"):
        trained(run_recipe(dataset, finished.folder, optimizer={"learning_rate": 0.1}))


def test_a_folder_of_other_things_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="no run of Braid; set `output` to a new folder"):
        trained(run_recipe(dataset, tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_run_whose_loss_is_no_number_stops_and_says_so(dataset: Dataset, tmp_path: Path) -> None:
    recipe = run_recipe(dataset, tmp_path / "run", optimizer={"learning_rate": 1e30}, gradient_clip=1e30)
    with pytest.raises(RunError, match=r"step \d+: the loss or its gradient is not a number.*Lower optimizer"):
        trained(recipe)


def test_tensorboard_holds_the_curves(dataset: Dataset, tmp_path: Path) -> None:
    trained(run_recipe(dataset, tmp_path / "run", steps=4, logging={"every": 2, "tensorboard": True}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss/audio")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("validation/loss/audio_codebooks/1")] == [4]


def test_a_run_computes_blocks_again_where_its_memory_asks_for_it(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    recipe = run_recipe(dataset, tmp_path / "run")
    config = config_of(recipe)[0]
    every, none = (make_plan(recipe.model_copy(update={"recompute_every": n}), config).memory_gib for n in (1, 0))
    assert every < none
    with (tmp_path / "screen").open("w") as screen:
        run(recipe.model_copy(update={"memory_gib": (every + none) / 2}), Console(file=screen))
    assert re.search(r"memory_gib = 0\.\d+: [1-9] of \d blocks are computed again", (tmp_path / "screen").read_text())
    assert losses_of(tmp_path / "run") == losses_of(finished.folder)


def test_the_screen_tells_the_progress(dataset: Dataset, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        run(run_recipe(dataset, tmp_path / "a [/b] :cat: run", steps=4), Console(file=screen))
    said = (tmp_path / "screen").read_text()
    assert f"4 steps of 384 tokens, in {tmp_path}/a [/b] :cat: run" in said
    assert "fp32 on cpu, attention by sdpa" in said
    assert "step 4/4  text" in said
    assert "validation at step 4: text" in said
    assert "(unigram" in said
