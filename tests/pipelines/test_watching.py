"""What a run tells: losses by dataset, utilisation, and the boards that draw it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import MODALITIES, UnifiedTransformer, UnifiedTransformerConfig
from pipelines.loading import Index, Loader
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.inventory import summary
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.mfu import peak_of, peak_tflops
from pipelines.pretrain.plan import config_of, make_plan
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError
from pipelines.shards.dataset import Dataset
from tests.pipelines.corpora import VOCABULARY
from tests.pipelines.training import run_recipe, trained


def test_sums_by_group_are_those_of_the_targets_of_its_rows(dataset: Dataset) -> None:
    config = UnifiedTransformerConfig(
        text_vocab_size=VOCABULARY.text_vocab_size, image_vocab_size=32, audio_vocab_size=32, hidden_size=16,
        num_layers=1, num_attention_heads=2, ffn_hidden_size=32, max_sequence_length=96, device="cpu",
        loss_chunk_tokens=50,
    )  # fmt: skip
    model = UnifiedTransformer(config)
    with Loader(Index.build(dataset, 96), sequences=4, micro_batch=4, seed=0, window_tokens=4000) as loader:
        (batch,) = next(loader).micro_batches
    # "a" is there in two versions.
    datasets = Datasets(["a", "b", "a"])
    rows = datasets.of_rows(torch.tensor([0, 1, 2, 1]))
    assert rows.tolist() == [0, 1, 0, 1]
    loss = model.loss(batch, row_groups=rows, group_count=len(datasets))
    losses = model.token_losses(batch)
    counts = datasets.counts(batch, rows)
    for m, name in enumerate(MODALITIES):
        targets = batch.targets[name]
        of = rows[targets.positions // 96]
        for group in (0, 1):
            mine = (of == group) & (torch.arange(len(of)) < targets.count)
            assert loss.group_sums[group, m] == pytest.approx(float(losses[name][mine].detach().sum()), rel=1e-5)
            assert int(counts[group, m]) == int(mine.sum())
    assert datasets.means([[2.0, 3.0, 0.0], [0.0] * 3], [[1, 2, 0], [0, 0, 0]]) == {
        "a": {"text": 2.0, "image": 1.5, "audio": None}
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce GTX 1080", None),
        ("", None),
    ],
)
def test_a_gpu_is_known_by_name_or_not_at_all(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_utilisation_is_told_where_the_peak_is_known(dataset: Dataset, tmp_path: Path) -> None:
    assert peak_of(torch.device("cpu"), "bf16") is None
    logging = {"every": 2, "tensorboard": True}
    plain = trained(run_recipe(dataset, tmp_path / "plain", steps=2, schedule={}, logging=logging)).folder
    assert not any("mfu" in r for r in read_metrics(plain / "metrics.jsonl", "train"))
    recipe = run_recipe(dataset, tmp_path / "run", steps=2, schedule={}, logging=logging | {"peak_tflops": 0.5})
    folder = trained(recipe).folder
    flops = make_plan(recipe, config_of(recipe)[0]).flops_per_token
    for record in read_metrics(folder / "metrics.jsonl", "train"):
        for convention in ("full", "causal"):
            expected = flops[convention] * record["tokens_per_s"] / 0.5e12
            assert record["mfu"][convention] == pytest.approx(expected)
        assert record["memory_gb"] > 0.05
        assert record["datasets"] == {"tokens": record["loss"]}
    assert 0 < summary(folder)["mfu"] < 1
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/datasets/tokens/text")] == [1, 2]
    assert [e.step for e in events.Scalars("train/mfu/full")] == [1, 2]
    assert [e.step for e in events.Scalars("save/pause_s")] == [2]
    assert summary(folder)["save_pause_s"] > 0


def test_wandb_where_it_is_not_installed_is_refused_before_any_work(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    recipe = run_recipe(dataset, tmp_path / "run", logging={"wandb": "offline"})
    with pytest.raises(RunError, match=r"package wandb is not installed; pip install 'wandb>=0.22', or set"):
        trained(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_offline_holds_the_curves_of_one_run_however_often_it_was_started(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="pip install 'braid-lm[wandb]'")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    recipe = run_recipe(dataset, tmp_path / "run", logging={"every": 2, "tensorboard": False, "wandb": "offline"})
    folder = trained(recipe).folder
    (folder / "finished.json").unlink()
    assert trained(recipe).resumed_from == 12
    identity = (folder / "wandb/id").read_text()
    files = list((folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss/audio", b"train/datasets/tokens/text", b"validation/loss/text", b"learning_rate"):
        assert name in content


def test_an_output_on_an_object_store_is_refused_with_the_remedy(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="a run folder must be on a file system"):
        PretrainRecipe.model_validate(run_recipe(dataset, Path("x")).model_dump() | {"output": "s3://bucket/run"})
