"""Pretraining runs of a tiny model, real but for their size: what the tests of training share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipelines.interleave import EncodedSpan, interleave
from pipelines.pretrain.export import load_model
from pipelines.pretrain.loop import run
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunResult
from pipelines.recipe import dump_recipe
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from tests.pipelines.corpora import VOCABULARY

ROOT = Path(__file__).parents[2]
SILENT = Console(quiet=True)

TINY: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64, "dropout": 0.1},
    "optimizer": {"learning_rate": 3e-3},
    "schedule": {"warmup_steps": 2},
    "precision": "fp32",
    "logging": {"every": 2, "tensorboard": False},
    "device": "cpu",
    "threads": 1,
}
"""24,512 parameters, on one thread of the CPU."""

LEAN = {"precision": "bf16", "masters": "optimizer", "optimizer": {"learning_rate": 3e-3, "moments": "bf16"}}

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_recipe(dataset: Dataset | Path, output: Path, **changes: Any) -> PretrainRecipe:
    """Twelve steps, with a checkpoint every four.

    Args:
        changes: sections, each as a whole.
    """
    values: dict[str, Any] = TINY | {
        "output": str(output),
        "data": {"dataset": str(dataset if isinstance(dataset, Path) else dataset.uri), "sequence_length": 96},
        "batch": {"sequences": 4, "micro_batch": 2},
        "steps": 12,
        "checkpoints": {"every": 4},
        "validation": {"every": 6},
    }
    return PretrainRecipe.model_validate(values | changes)


def trained(recipe: PretrainRecipe) -> RunResult:
    """What a run in this process comes to."""
    return run(recipe, SILENT)


def started(recipe: PretrainRecipe, folder: Path, *launcher: str, before: str = "pass") -> subprocess.Popen[bytes]:
    """A run in processes of its own.

    Args:
        before: what they do first.
    """
    file = folder / "recipe-of-the-test.yaml"
    file.write_text(dump_recipe(recipe))
    code = f"import sys; {before}; from pipelines.pretrain import main; main(sys.argv[1])"
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


def losses_of(folder: Path) -> list[tuple[int, Any, float]]:
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in read_metrics(folder / "metrics.jsonl", "train")]


def torch_weights(folder: Path) -> dict[str, list[Any]]:
    model, _, _ = load_model(folder)
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


def unfinished(finished: RunResult, tmp_path: Path) -> Path:
    """A copy of a run that still has to reach its end, in another place."""
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    return tmp_path / "run"


def assert_close(ours: list[Any], theirs: list[Any]) -> None:
    assert [step for step, _, _ in ours] == [step for step, _, _ in theirs]
    for (_, one, norm), (_, other, other_norm) in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


def counting_row(identity: str, rng: np.random.Generator) -> Row:
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
