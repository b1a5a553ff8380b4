"""`braid checkpoint` and `braid runs`, on real runs of a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.pretrain import export
from pipelines.pretrain.checkpoint import CheckpointError
from pipelines.pretrain.export import load_model
from pipelines.pretrain.run import RunResult
from tests.pipelines.corpora import make_dataset
from tests.pipelines.training import run_recipe, trained

TOKENIZERS = {"text": {"model": "mistral-v1"}, "image": {"checkpoint": "drawings"}, "audio": {"checkpoint": "speech"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(folder / "tokens", units=3, rows=30)
    (folder / "tokens/recipes").mkdir()
    (folder / "tokens/recipes/0.yaml").write_text(json.dumps({"tokenizers": TOKENIZERS}))
    model = run_recipe(dataset, folder).model.model_dump() | {"tie_text_embeddings": True}
    return [
        trained(run_recipe(dataset, folder / name, model=model, optimizer={"learning_rate": rate}, **more))
        for name, rate, more in (
            ("slow", 1e-3, {}),
            ("fast", 3e-3, {"checkpoints": {"every": 4, "export": True, "keep": 1, "keep_every": 4}}),
        )
    ]


def _said(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_list_tells_every_checkpoint(runs: list[RunResult]) -> None:
    found = json.loads(_said("checkpoint", "list", runs[0].folder, "--json"))
    assert [told["step"] for told in found] == [8, 12]
    assert all(told["world_size"] == 1 and told["bytes"] > 10_000 for told in found)
    kept = json.loads(_said("checkpoint", "list", runs[1].folder, "--json"))
    assert [told["step"] for told in kept] == [4, 8, 12]
    assert "12" in _said("checkpoint", "list", runs[0].folder)


def test_verify_names_a_damaged_file_and_ends_with_1(runs: list[RunResult], tmp_path: Path) -> None:
    assert _said("checkpoint", "verify", runs[0].folder).count("whole") == 2
    folder = shutil.copytree(runs[0].folder, tmp_path / "run")
    data = next((folder / "checkpoints/step-00000008/state").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    assert "step-00000012: whole" in _said("checkpoint", "verify", folder, code=1)


def test_an_exported_checkpoint_is_the_model_of_the_run(runs: list[RunResult], tmp_path: Path) -> None:
    _said("checkpoint", "export", runs[0].folder, "--out", tmp_path / "model")
    ours, vocabulary, about = load_model(tmp_path / "model")
    theirs, expected, about_theirs = load_model(runs[0].folder)
    assert vocabulary == expected
    assert about["step"] == 12
    assert about["tokenizers"] == about_theirs["tokenizers"] == TOKENIZERS
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items())
    assert ours.config.tie_text_embeddings
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert size == (runs[0].model / "model.safetensors").stat().st_size


def test_every_checkpoint_may_be_exported_while_training_goes_on(runs: list[RunResult]) -> None:
    exports = sorted(p.name for p in (runs[1].folder / "exports").iterdir())
    assert exports == ["step-00000004", "step-00000008", "step-00000012"]
    last, _, about = load_model(runs[1].folder / "exports/step-00000012")
    final = load_model(runs[1].folder)[0].state_dict()
    assert all(torch.equal(tensor, final[name]) for name, tensor in last.state_dict().items())
    assert load_model(runs[1].folder / "exports/step-00000004")[2]["step"] == 4
    assert about["dataset_version"] == 3


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["checkpoint", "list", str(tmp_path)])
    assert isinstance(result.exception, CheckpointError)
    assert "no checkpoint here" in str(result.exception)


def test_runs_are_listed_shown_and_compared(runs: list[RunResult], tmp_path: Path) -> None:
    folder = runs[0].folder.parent
    found = {Path(told["run"]).name: told for told in json.loads(_said("runs", "list", folder, "--json"))}
    assert set(found) == {"slow", "fast"}
    assert found["slow"]["steps"] == 12
    assert found["slow"]["finished"]
    assert found["slow"]["validation"]["text"] == runs[0].validation.text  # type: ignore[union-attr]
    told = json.loads(_said("runs", "show", runs[0].folder, "--json"))
    assert [c["step"] for c in told["checkpoints"]] == [8, 12]
    _said("runs", "compare", runs[0].folder, runs[1].folder, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Validation loss of audio" in page
    assert "optimizer.learning_rate" in page
    assert "0.001" in page


def test_a_shipped_model_in_bfloat16_is_found_by_its_name(
    runs: list[RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "shipped/draws"
    _said("checkpoint", "export", runs[0].folder, "--out", model, "--dtype", "bf16")
    half = load_file(model / "model.safetensors")
    whole = load_file(runs[0].model / "model.safetensors")
    assert half.keys() == whole.keys()
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())
    monkeypatch.setattr(export, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert export.shipped_models() == ["draws"]
    found = load_model("draws")[0].state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())
    with pytest.raises(CheckpointError, match=r"or a shipped model \(draws\)"):
        load_model("paints")
