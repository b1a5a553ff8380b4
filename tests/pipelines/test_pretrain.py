"""Pretraining, on real runs of a tiny model: what a run leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import MODALITIES, PackedBatch
from pipelines.interleave import EncodedSpan, interleave
from pipelines.pretrain.checkpoint import CheckpointError, list_checkpoints
from pipelines.pretrain.export import load_model
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import drop_after, read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError, RunResult
from pipelines.recipe import dump_recipe
from pipelines.sequence import Modality, VocabularyError
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.split import is_validation
from tests.pipelines.corpora import VOCABULARY, make_dataset, write_unit

ROOT = Path(__file__).parents[2]
SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("pretrain") / "tokens", units=3, rows=30)


def _recipe(dataset: Dataset | Path, output: Path, **changes: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "output": str(output),
        "data": {"dataset": str(dataset if isinstance(dataset, Path) else dataset.uri), "sequence_length": 96},
        "model": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64, "dropout": 0.1},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 2},
        "batch": {"sequences": 4, "micro_batch": 2},
        "steps": 12,
        "precision": "fp32",
        "checkpoints": {"every": 4},
        "validation": {"every": 6},
        "logging": {"every": 2, "tensorboard": False},
        "device": "cpu",
        "threads": 1,
    }
    return PretrainRecipe.model_validate(values | changes)


def _run(recipe: PretrainRecipe) -> RunResult:
    return run(recipe, SILENT)


def _losses(folder: Path) -> list[tuple[int, Any, float]]:
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in read_metrics(folder / "metrics.jsonl", "train")]


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An undisturbed run of `_recipe`."""
    return _run(_recipe(dataset, tmp_path_factory.mktemp("undisturbed") / "run"))


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
    again = _run(_recipe(dataset, finished.folder))
    assert again.already_finished
    assert again.validation == finished.validation
    assert again.baseline == finished.baseline
    assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*")} == before


def test_a_finished_run_whose_model_is_gone_exports_it_again(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    shutil.rmtree(folder / "model")
    again = _run(_recipe(dataset, folder))
    assert (again.resumed_from, again.already_finished) == (12, False)
    assert again.validation == finished.validation
    assert torch_weights(folder) == torch_weights(finished.folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(RunError, match="its model is gone and no checkpoint is left"):
        _run(_recipe(dataset, folder))
    assert _losses(folder) == _losses(finished.folder)


def test_what_decides_nothing_may_change_between_calls(
    dataset: Dataset, finished: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(dataset.uri).parent)
    recipe = _recipe(
        Path(Path(dataset.uri).name),
        finished.folder,
        threads=2,
        logging={"every": 7, "tensorboard": True},
        checkpoints={"every": 3, "keep": 1},
        validation={"every": 5},
    )
    assert _run(recipe).already_finished


@pytest.mark.parametrize("end", ["finished", "unfinished"])
def test_another_length_is_refused_saying_what_to_do(
    dataset: Dataset, finished: RunResult, tmp_path: Path, end: str
) -> None:
    folder = finished.folder if end == "finished" else _unfinished(finished, tmp_path)
    with pytest.raises(RunError, match=rf"steps: 12 there, 20 here\n.*new folder, or delete the folder {folder}"):
        _run(_recipe(dataset, folder, steps=20))


def test_a_run_that_never_saved_gives_its_folder_to_a_corrected_recipe(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a number"):
        _run(_recipe(dataset, tmp_path / "run", optimizer={"learning_rate": 1e30}, gradient_clip=1e30))
    assert _run(_recipe(dataset, tmp_path / "run", steps=3)).steps == 3
    assert "learning_rate: 0.003" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_an_output_that_is_a_file_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    for output in (tmp_path / "notes", tmp_path / "notes" / "run"):
        with pytest.raises(RunError, match=rf"{tmp_path / 'notes'}: a file, where `output` = {output} needs a folder"):
            _run(_recipe(dataset, output))


def test_a_truncated_end_of_a_run_is_named_with_its_remedy(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished.folder, tmp_path / "run")
    end = folder / "finished.json"
    end.write_bytes(end.read_bytes()[:20])
    with pytest.raises(RunError, match=f"{end} is damaged; delete it"):
        _run(_recipe(dataset, folder))
    end.unlink()
    assert _run(_recipe(dataset, folder)).validation == finished.validation


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
        _run(_recipe(dataset, finished.folder, optimizer={"learning_rate": 0.1}))


def test_a_folder_of_other_things_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="no run of Braid; set `output` to a new folder"):
        _run(_recipe(dataset, tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def _start(recipe: PretrainRecipe, folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    file = folder / "recipe-of-the-test.yaml"
    file.write_text(dump_recipe(recipe))
    code = "import sys; from pipelines.pretrain import main; main(sys.argv[1])"
    script = folder / "train.py"
    script.write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(file)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_killed_run_goes_on_bit_for_bit(dataset: Dataset, finished: RunResult, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run", logging={"every": 1, "tensorboard": False})
    process = _start(recipe, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b'"train"') >= 6):
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "finished.json").exists()
    with metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    went_on = _run(recipe)
    assert went_on.resumed_from in (4, 8)
    assert _losses(went_on.folder) == _losses(finished.folder)
    assert went_on.validation == finished.validation
    ours, theirs = (torch_weights(folder) for folder in (went_on.folder, finished.folder))
    assert ours == theirs


def test_a_second_process_in_the_same_folder_is_refused_and_disturbs_nothing(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = _unfinished(finished, tmp_path)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=rf"{folder}: another process is training here; wait for it, or set"):
            _run(_recipe(dataset, folder))
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    finally:
        holder.kill()
        holder.communicate()
    assert _run(_recipe(dataset, folder)).resumed_from == 12


def torch_weights(folder: Path) -> dict[str, list[Any]]:
    model, _, _ = load_model(folder)
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes_and_one_goes_on_from_two(dataset: Dataset, tmp_path: Path) -> None:
    # Dropout draws by rank, so it is off here.
    model = _recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0}
    alone = _run(_recipe(dataset, tmp_path / "alone", model=model, batch={"sequences": 8, "micro_batch": 2}))
    recipe = _recipe(dataset, tmp_path / "two", model=model, batch={"sequences": 8, "micro_batch": 2})
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = _start(recipe, tmp_path, *torchrun)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr.decode()
    _assert_close(_losses(tmp_path / "two"), _losses(alone.folder))
    # Forget the last four steps, and take them again with one rank.
    (tmp_path / "two" / "finished.json").unlink()
    last = list_checkpoints(tmp_path / "two" / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    assert _run(recipe).resumed_from == 8
    _assert_close(_losses(tmp_path / "two"), _losses(alone.folder))


@pytest.mark.slow
def test_four_ranks_with_masters_in_the_optimizer_follow_one_and_two_go_on(dataset: Dataset, tmp_path: Path) -> None:
    model = _recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0, "block_backend": "fused"}
    more = LEAN | {"model": model, "batch": {"sequences": 8, "micro_batch": 1}}
    alone = _losses(_run(_recipe(dataset, tmp_path / "alone", **more)).folder)
    recipe = _recipe(dataset, tmp_path / "four", **more)
    for ranks in (4, 2):
        process = _start(recipe, tmp_path, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr.decode()
        four = _losses(tmp_path / "four")
        assert [step for step, _, _ in four] == [step for step, _, _ in alone]
        for (_, ours, _), (_, theirs, _) in zip(four, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-3)
        # Forget the last four steps, and take them again with two ranks.
        (tmp_path / "four" / "finished.json").unlink()
        shutil.rmtree(list_checkpoints(tmp_path / "four" / "checkpoints")[-1])


def _assert_close(ours: list[Any], theirs: list[Any]) -> None:
    assert [step for step, _, _ in ours] == [step for step, _, _ in theirs]
    for (_, one, norm), (_, other, other_norm) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"sequences": 4, "micro_batch": 4}},
        {"recompute_every": 1},
        pytest.param({"compile": True, "recompute_every": 2}, marks=pytest.mark.slow),
    ],
)
def test_micro_batches_recomputation_and_compilation_change_no_loss(
    dataset: Dataset, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = _recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0}
    plain, other = (
        _run(_recipe(dataset, tmp_path / name, steps=3, model=model, **more)).folder
        for name, more in (("plain", {}), ("other", change))
    )
    _assert_close(_losses(other), _losses(plain))


def test_bf16_follows_fp32(dataset: Dataset, tmp_path: Path, finished: RunResult) -> None:
    half = _run(_recipe(dataset, tmp_path / "bf16", precision="bf16"))
    assert half.validation is not None
    assert finished.validation is not None
    assert dict(half.validation.items()) == pytest.approx(dict(finished.validation.items()), rel=0.02)


LEAN = {"precision": "bf16", "masters": "optimizer", "optimizer": {"learning_rate": 3e-3, "moments": "bf16"}}


@pytest.mark.parametrize("blocks", ["torch", "fused"])
def test_bf16_weights_with_masters_in_the_optimizer_follow_fp32_and_go_on(
    dataset: Dataset, tmp_path: Path, finished: RunResult, blocks: str
) -> None:
    model = _recipe(dataset, tmp_path).model.model_dump() | {"dropout": 0.0, "block_backend": blocks}
    recipe = _recipe(dataset, tmp_path / "lean", model=model, **LEAN)
    lean = _run(recipe)
    assert lean.validation is not None
    assert finished.validation is not None
    assert dict(lean.validation.items()) == pytest.approx(dict(finished.validation.items()), rel=0.05)
    before, weights = _losses(lean.folder), torch_weights(lean.folder)
    (lean.folder / "finished.json").unlink()
    last = list_checkpoints(lean.folder / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    assert _run(recipe).resumed_from == 8
    assert _losses(lean.folder) == before
    assert torch_weights(lean.folder) == weights


def _row(identity: str, rng: np.random.Generator) -> Row:
    """A document whose next token is easy to guess for who looks back: counting up from a random start."""
    start = int(rng.integers(50))
    spans = [
        EncodedSpan(modality=Modality.TEXT, codes=((start + np.arange(12)) % 50).astype(np.int32)),
        EncodedSpan(modality=Modality.IMAGE, codes=((start + np.arange(20)) % 32).reshape(4, 5).astype(np.int32)),
        EncodedSpan(modality=Modality.AUDIO, codes=((start + np.arange(20)) % 16).reshape(10, 2).astype(np.int32)),
    ]
    return Row(
        row_id=identity,
        content_hash=rng.bytes(16).hex(),
        source=f"c/{identity}",
        sequence=interleave(VOCABULARY, spans),
    )


def test_a_model_learns_every_modality_below_its_token_frequencies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0.1)
    dataset.commit([write_unit(dataset, "u", [_row(str(i), rng) for i in range(300)])])
    recipe = _recipe(dataset, tmp_path / "run", steps=80, optimizer={"learning_rate": 1e-2}, checkpoints={"every": 100})
    result = _run(recipe)
    assert result.validation is not None
    assert result.baseline is not None
    reference = dict(result.baseline.items())
    reached = dict(result.validation.items())
    assert set(reached) == {"text", "image", "audio", "audio/0", "audio/1"}
    assert all(reached[name] < 0.7 * reference[name] for name in reached), (reached, reference)


def _frequencies(dataset: Dataset, *, validation: bool) -> dict[str, Counter[int]]:
    counts: dict[str, Counter[int]] = {name: Counter() for name in ("text", "image", "audio/0", "audio/1")}
    for batch in dataset.read():
        for row in batch.to_pylist():
            if is_validation(row["source"], dataset.validation_share) != validation:
                continue
            for token, modality in list(zip(row["token_ids"], row["modality_ids"], strict=True))[1:]:
                counts[("text", "image", f"audio/{token // 16}")[modality]][token] += 1
    return counts


def test_the_baseline_is_the_smoothed_unigram_of_the_training_split(dataset: Dataset, finished: RunResult) -> None:
    train, held_out = (_frequencies(dataset, validation=v) for v in (False, True))
    sizes = {"text": VOCABULARY.text_vocab_size, "image": 32, "audio/0": 16, "audio/1": 16}
    assert finished.baseline is not None
    found = dict(finished.baseline.items())
    for name, size in sizes.items():
        total = sum(train[name].values()) + size
        expected = -sum(n * math.log((train[name][t] + 1) / total) for t, n in held_out[name].items())
        assert found[name] == pytest.approx(expected / sum(held_out[name].values()), rel=1e-9)


def test_validation_is_the_mean_over_all_held_out_tokens(dataset: Dataset, finished: RunResult) -> None:
    model, _, _ = load_model(finished.folder)
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for batch in dataset.read():
        for row in batch.to_pylist():
            if not is_validation(row["source"], dataset.validation_share):
                continue
            # One document alone in a row, so neither packing nor the loader has a part in this.
            alone = PackedBatch.from_tensors(torch.tensor([row["token_ids"]]), torch.tensor([row["modality_ids"]]))
            with torch.no_grad():
                losses = model.token_losses(alone)
            for name in MODALITIES:
                sums[name] += losses[name].double().sum().item()
                counts[name] += alone.targets[name].count
    assert finished.validation is not None
    for name in MODALITIES:
        assert getattr(finished.validation, name) == pytest.approx(sums[name] / counts[name], rel=1e-5)


def test_without_validation_documents_there_is_no_validation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = Dataset.create(tmp_path / "d", VOCABULARY, validation_share=0)
    dataset.commit([write_unit(dataset, "u", [_row(str(i), rng) for i in range(20)])])
    result = _run(_recipe(dataset, tmp_path / "run", steps=3))
    assert result.validation is None
    assert result.baseline is None
    assert _run(_recipe(dataset, tmp_path / "run", steps=3)).already_finished


def test_a_run_keeps_to_the_version_it_began_with(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=30)
    recipe = _recipe(dataset, tmp_path / "run")
    _run(recipe)
    (tmp_path / "run" / "finished.json").unlink()
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    last.rename(last.with_name("gone"))
    before = _losses(tmp_path / "run")
    rng = np.random.default_rng(9)
    dataset.commit([write_unit(dataset, "later", [_row(f"n{i}", rng) for i in range(30)])])
    assert _run(recipe).resumed_from == 8
    assert _losses(tmp_path / "run") == before
    assert load_model(tmp_path / "run")[2]["dataset_version"] == 2


def _unfinished(finished: RunResult, tmp_path: Path) -> Path:
    """A copy of a run that still has to reach its end, in another place."""
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "fault",
    ["truncated", "flipped", "missing", "no record", "bad record", "edited", "renamed", "foreign", "newer"],
)
def test_a_damaged_checkpoint_is_refused_naming_file_and_remedy(
    dataset: Dataset, finished: RunResult, tmp_path: Path, fault: str
) -> None:
    folder = _unfinished(finished, tmp_path)
    checkpoint = folder / "checkpoints" / "step-00000012"
    data = next((checkpoint / "state").glob("*.distcp"))
    record = checkpoint / "checkpoint.json"
    remedy = f"; delete the folder {checkpoint}, and the run goes on from the checkpoint before it"
    match fault:
        case "truncated":
            data.write_bytes(data.read_bytes()[:-100])
            expected = f"{data} is damaged or truncated.*{remedy}"
        case "flipped":
            content = bytearray((checkpoint / "state" / ".metadata").read_bytes())
            content[len(content) // 2] ^= 1
            (checkpoint / "state" / ".metadata").write_bytes(bytes(content))
            expected = rf"\.metadata is damaged.*{remedy}"
        case "missing":
            data.unlink()
            expected = f"{data} is missing{remedy}"
        case "no record":
            record.unlink()
            expected = f"{record} is missing, so .* is no Braid checkpoint{remedy}"
        case "bad record":
            record.write_bytes(record.read_bytes()[:200])
            expected = f"{record} is damaged or not Braid's{remedy}"
        case "edited":
            record.write_bytes(record.read_bytes().replace(b'"learning_rate": 0.003', b'"learning_rate": 0.004'))
            expected = f"{record} is damaged: its sha256 is not the one that it names{remedy}"
        case "renamed":
            checkpoint.rename(checkpoint := checkpoint.with_name("step-00000013"))
            expected = "step-00000013/checkpoint.json is of step 12, unlike the name of its folder; delete"
        case "foreign":
            record.write_text(json.dumps({"global_step": 3}))
            expected = f"{record} is damaged or not Braid's{remedy}"
        case _:
            record.write_text(json.dumps(json.loads(record.read_text()) | {"format_version": 99}))
            expected = "written in format 99, this Braid reads 1; update Braid"
    with pytest.raises(CheckpointError, match=expected):
        _run(_recipe(dataset, folder))
    if "delete" in expected:
        shutil.rmtree(checkpoint)
        assert _run(_recipe(dataset, folder)).resumed_from == 8
        assert _losses(folder) == _losses(finished.folder)


def test_without_another_checkpoint_a_damaged_one_means_to_start_over(
    dataset: Dataset, finished: RunResult, tmp_path: Path
) -> None:
    folder = _unfinished(finished, tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    checkpoint = folder / "checkpoints" / "step-00000012"
    (checkpoint / "state" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=f"missing; delete the folder {checkpoint}, and the run starts over"):
        _run(_recipe(dataset, folder))


def test_a_checkpoint_of_another_vocabulary_is_refused(finished: RunResult, tmp_path: Path) -> None:
    folder = _unfinished(finished, tmp_path)
    other = Dataset.create(tmp_path / "d", replace(VOCABULARY, image_codebook_size=64), validation_share=0.2)
    rng = np.random.default_rng(0)
    for unit in range(3):
        other.commit([write_unit(other, f"u{unit}", [_row(f"{unit}-{i}", rng) for i in range(9)])])
    recipe = (folder / "recipe.yaml").read_text().splitlines()
    moved = [f"  dataset: {tmp_path / 'd'}" if line.strip().startswith("dataset:") else line for line in recipe]
    (folder / "recipe.yaml").write_text("\n".join(moved))
    with pytest.raises(VocabularyError, match=r"image_codebook_size: 32, 64"):
        _run(_recipe(other, folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocabulary.json", "braid.json"])
def test_a_truncated_model_is_refused(finished: RunResult, tmp_path: Path, name: str) -> None:
    folder = _unfinished(finished, tmp_path) / "model"
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is (truncated|damaged).*again"):
        load_model(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model(folder)


def test_a_run_whose_loss_is_no_number_stops_and_says_so(dataset: Dataset, tmp_path: Path) -> None:
    recipe = _recipe(dataset, tmp_path / "run", optimizer={"learning_rate": 1e30}, gradient_clip=1e30)
    with pytest.raises(RunError, match=r"step \d+: the loss or its gradient is not a number.*Lower optimizer"):
        _run(recipe)


def test_tensorboard_holds_the_curves(dataset: Dataset, tmp_path: Path) -> None:
    _run(_recipe(dataset, tmp_path / "run", steps=4, logging={"every": 2, "tensorboard": True}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss/audio")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("validation/loss/audio_codebooks/1")] == [4]


def test_the_screen_tells_the_progress(dataset: Dataset, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        run(_recipe(dataset, tmp_path / "a [/b] :cat: run", steps=4), Console(file=screen))
    said = (tmp_path / "screen").read_text()
    assert f"4 steps of 384 tokens, in {tmp_path}/a [/b] :cat: run" in said
    assert "fp32 on cpu, attention by sdpa" in said
    assert "step 4/4  text" in said
    assert "validation at step 4: text" in said
    assert "(unigram" in said
