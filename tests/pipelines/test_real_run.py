"""The benchmark of whole runs: its documents, and all of it at tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.packed_workload import SHARES
from benchmarks.shaped_documents import VOCABULARY, shaped_dataset
from model import UnifiedTransformerConfig
from pipelines.interleave import deinterleave
from pipelines.pretrain.recipe import PretrainRecipe, model_config
from pipelines.recipe import read_recipe
from pipelines.sequence import Modality
from tests.pipelines.training import ROOT


def test_shaped_documents_keep_the_contract_and_have_the_shares_of_the_workload(tmp_path: Path) -> None:
    dataset = shaped_dataset(tmp_path / "tokens", 120_000, longest=2048)
    statistics = dataset.statistics()
    assert 120_000 <= statistics.tokens() < 125_000
    counts = np.zeros(3)
    for batch in dataset.read(["token_ids", "modality_ids"]):
        for row in batch.to_pylist():
            ids, modalities = np.array(row["token_ids"], np.int32), np.array(row["modality_ids"], np.int8)
            spans = deinterleave(dataset.vocabulary, ids, modalities)
            assert [span.modality for span in spans] == [Modality.TEXT, Modality.IMAGE, Modality.AUDIO]
            assert 2048 // 16 <= len(ids) <= 2048
            counts += np.bincount(modalities, minlength=3)
    # Pictures are rectangles and sounds whole frames, so that text has a little more.
    assert (counts / counts.sum()).tolist() == pytest.approx(list(SHARES.values()), abs=0.02)


def test_models_of_shaped_documents_are_the_reference_configuration() -> None:
    recipe = read_recipe(PretrainRecipe, "pretrain/8b")
    reference = UnifiedTransformerConfig(device="meta")
    assert model_config(recipe, VOCABULARY).num_parameters() == reference.num_parameters()


@pytest.mark.slow
def test_a_run_on_two_ranks_saves_and_one_rank_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.real_run", "--quick", "--ranks", "2", "--folder", str(tmp_path)]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (record,) = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert "error" not in record, record
    (save,) = [each for each in record["saves"] if each["step"] == 8]
    assert 0 < save["pause_s"] < 60
    assert save["whole_after_s"] > 0
    (resumed,) = record["resumed"]
    assert (resumed["saved_on"], resumed["ranks"], resumed["steps"], resumed["agrees"]) == (2, 1, 4, True)
    # Ranks of a run are gone when it is.
    assert f"{tmp_path}" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
