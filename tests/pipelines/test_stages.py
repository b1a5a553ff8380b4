"""Training by stages on a dataset that grows: what a stage trains on, how long, at which rate, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.exclusive import create_exclusively
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError, RunResult
from pipelines.pretrain.stages import StageError, claim_stage, read_stages, stage_recipe, unfinished
from pipelines.recipe import dump_recipe
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import make_dataset

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of version 2 and 3, for two stages."""
    return make_dataset(tmp_path_factory.mktemp("stages") / "tokens", units=3, rows=20)


def _recipe(dataset: Dataset, output: Path, **changes: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "output": str(output),
        "data": {"dataset": dataset.uri, "sequence_length": 96},
        "model": {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 64},
        "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 2, "minimum": 0.0},
        "batch": {"sequences": 2, "micro_batch": 2},
        "steps": STEPS,
        "precision": "fp32",
        "checkpoints": {"every": 2},
        "logging": {"every": 2, "tensorboard": False},
        "device": "cpu",
        "threads": 1,
    }
    return PretrainRecipe.model_validate(values | changes)


def _stage(recipe: PretrainRecipe, version: int) -> RunResult:
    stage = claim_stage(Path(recipe.output), STEPS, version, "a test")
    return run(stage_recipe(recipe, stage), Console(quiet=True))


def _train(folder: Path) -> list[tuple[int, Any, float]]:
    return [(r["step"], r["loss"], r["learning_rate"]) for r in read_metrics(folder / "metrics.jsonl", "train")]


@pytest.fixture(scope="module")
def two(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, undisturbed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    for version in (2, 3):
        _stage(_recipe(dataset, folder), version)
    return folder


def test_each_stage_takes_its_steps_on_its_version(two: Path) -> None:
    stages = [(s.number, s.from_step, s.to_step, s.version) for s in read_stages(two)]
    assert stages == [(1, 0, STEPS, 2), (2, STEPS, 2 * STEPS, 3)]
    assert [step for step, _, _ in _train(two)] == list(range(1, 2 * STEPS + 1))
    assert "version: 3" in (two / "recipe.yaml").read_text()
    assert unfinished(two) is None


def test_the_rate_warms_up_once_and_falls_at_the_end_of_each_stage(two: Path) -> None:
    peak = 3e-4
    shares = [round(rate / peak, 6) for _, _, rate in _train(two)]
    assert shares == [0.5, 1, 1, 1, 0.5, 0, 1, 1, 1, 1, 0.5, 0]


def test_a_stage_on_an_unchanged_dataset_sees_it_in_another_order(dataset: Dataset, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run", optimizer={"learning_rate": 1e-12})
    for _ in range(2):
        _stage(recipe, 3)
    losses = [loss for _, loss, _ in _train(tmp_path / "run")]
    assert all(one != other for one, other in zip(losses[:STEPS], losses[STEPS:], strict=True))


def test_a_stage_that_was_killed_ends_as_an_undisturbed_one(dataset: Dataset, two: Path, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run")
    _stage(recipe, 2)
    stage = claim_stage(tmp_path / "run", STEPS, 3, "a test")
    (tmp_path / "stage.yaml").write_text(dump_recipe(stage_recipe(recipe, stage)))
    (tmp_path / "once").touch()
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "pretrain", str(tmp_path / "stage.yaml")],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "BRAID_CRASH": f"before_rename:2:{tmp_path}/once"},
        stdout=subprocess.DEVNULL,
    )
    assert process.returncode == -signal.SIGKILL
    again = claim_stage(tmp_path / "run", STEPS, 99, "another one that comes later")
    assert again == stage
    run(stage_recipe(recipe, again), Console(quiet=True))
    assert _train(tmp_path / "run") == _train(two)
    ours, theirs = ((folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "run", two))
    assert ours == theirs


def test_a_finished_stage_is_left_alone(dataset: Dataset, two: Path) -> None:
    last = read_stages(two)[-1]
    assert run(stage_recipe(_recipe(dataset, two), last), Console(quiet=True)).already_finished


def test_a_stage_may_change_nothing_but_its_length_and_version(dataset: Dataset, two: Path) -> None:
    stage = claim_stage(two, STEPS, 3, "a test")
    try:
        with pytest.raises(RunError, match=r"optimizer\.learning_rate: 0\.0003 there, 0\.1 here"):
            run(stage_recipe(_recipe(dataset, two, optimizer={"learning_rate": 0.1}), stage))
    finally:
        (two / "stages" / f"{stage.number:04d}.json").unlink()


def test_a_stage_whose_checkpoint_is_gone_is_refused(dataset: Dataset, two: Path) -> None:
    checkpoints = two / "checkpoints"
    checkpoints.rename(two / "elsewhere")
    stage = claim_stage(two, STEPS, 3, "a test")
    try:
        with pytest.raises(StageError, match="goes on from step 12, but the newest checkpoint is of step 0"):
            run(stage_recipe(_recipe(dataset, two), stage))
    finally:
        (two / "elsewhere").rename(checkpoints)
        (two / "stages" / f"{stage.number:04d}.json").unlink()


def test_a_schedule_that_follows_the_length_of_the_run_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run", schedule={"kind": "cosine"})
    stage = claim_stage(tmp_path / "run", STEPS, 3, "a test")
    with pytest.raises(StageError, match=r"schedule\.kind = cosine: .* set schedule\.kind: wsd"):
        stage_recipe(recipe, stage)


def test_a_run_without_stages_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("x")
    with pytest.raises(StageError, match="not trained by stages lies here"):
        claim_stage(tmp_path, STEPS, 3, "a test")


def test_a_damaged_end_of_a_stage_is_named_with_its_remedy(tmp_path: Path) -> None:
    claim_stage(tmp_path, STEPS, 3, "a test")
    (tmp_path / "finished.json").write_text("{")
    with pytest.raises(StageError, match=r"finished\.json is damaged; delete it"):
        unfinished(tmp_path)


def test_of_many_that_claim_a_stage_all_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda n: claim_stage(tmp_path, STEPS, n, f"claimant {n}"), range(16)))
    assert len(set(got)) == 1
    assert read_stages(tmp_path) == got[:1]


def test_a_file_is_created_once_and_whole(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: create_exclusively(tmp_path / "f", str(n).encode() * 10_000), range(16)))
    assert sum(won) == 1
    assert (tmp_path / "f").read_text() == str(won.index(True)) * 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
