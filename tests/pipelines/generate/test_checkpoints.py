"""Checkpoints make files, reproducibly; damaged ones and devices that are not here are refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from pipelines.generate import GenerateError, Generator, Sampling, generate
from pipelines.pretrain.checkpoint import CheckpointError
from pipelines.pretrain.export import export_model
from pipelines.pretrain.parallelize import join_ranks
from pipelines.sequence import Vocabulary, parse
from pipelines.tokenize.recipe import TokenizeRecipe
from tests.pipelines.generate.parts import make_model, tokens_of


def test_a_checkpoint_makes_files_with_their_settings_beside_and_inside_them(
    checkpoint: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    prompt = "the fox & “dogs”"
    for want, suffix in [("text", ".txt"), ("image", ".png"), ("audio", ".wav")]:
        samples = generate(checkpoint, prompt=prompt, want=want, out=tmp_path, samples=2, seed=4, max_tokens=9)
        assert [s.files for s in samples] == [(tmp_path / f"the-fox-dogs-seed4-{i}{suffix}",) for i in (0, 1)]
        record = json.loads((tmp_path / f"the-fox-dogs-seed4-1{suffix}.json").read_text())
        assert record["prompt"] == [{"text": prompt}]
        assert (record["seed"], record["sample"], record["step"]) == (4, 1, 7)
        assert record["sampling"][want] == asdict(Sampling())
        assert (record["checkpoint"], record["fingerprint"]) == (str(checkpoint), vocabulary.fingerprint)
        tokens = record.pop("tokens")
        spans = parse(vocabulary, np.array(tokens["token_ids"], np.int32), np.array(tokens["modality_ids"], np.int8))
        assert spans[-1].modality.label == record["modality"] == want
        if want == "image":
            with Image.open(samples[1].files[0]) as picture:
                assert json.loads(picture.info["braid"]) == record  # type: ignore[attr-defined]
                assert picture.info["Description"] == prompt
        if want == "audio":
            with soundfile.SoundFile(samples[1].files[0]) as sound:
                assert json.loads(sound.comment) == record
                assert sound.title == prompt
                assert sound.frames == 80 * spans[-1].rows


def test_a_seed_reproduces_the_bytes_of_all_files(checkpoint: Path, tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        generate(checkpoint, want=["text", "image", "audio"], out=tmp_path / name, samples=2, seed=seed, max_tokens=9)
        made.append({file.name.replace("seed2", "seed1"): file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert len(made[0]) == 12
    assert made[0] == made[1]
    assert made[0].keys() == made[2].keys()
    assert all(made[0][name] != made[2][name] for name in made[0])


def test_a_model_of_the_first_codebooks_gets_a_tokenizer_of_them(
    vocabulary: Vocabulary, recipe: TokenizeRecipe, tmp_path: Path
) -> None:
    fewer = vocabulary.first_codebooks(1)
    about = {"tokenizers": recipe.tokenizers.model_dump(mode="json")}
    with join_ranks("cpu") as ranks:
        export_model(tmp_path / "model", make_model(fewer), fewer, about, ranks)  # type: ignore[arg-type]
    [sample] = generate(tmp_path, want="audio", seconds=0.1)
    assert sample.sequence.spans[0].columns == 1
    assert sample.spans[0].waveform is not None
    assert sample.spans[0].waveform.shape == (800,)


def test_a_model_trained_by_kernels_that_are_not_here_generates(
    vocabulary: Vocabulary, recipe: TokenizeRecipe, tmp_path: Path
) -> None:
    about = {"tokenizers": recipe.tokenizers.model_dump(mode="json")}
    made = []
    for name, backend in [("here", "auto"), ("elsewhere", "flash_attn_4")]:
        model = make_model(vocabulary, attention_backend=backend)
        with join_ranks("cpu") as ranks:
            export_model(tmp_path / name, model, vocabulary, about, ranks)  # type: ignore[arg-type]
        made.append(generate(tmp_path / name, want="image", prompt="lazy", seed=3))
    assert tokens_of(made[0][0]) == tokens_of(made[1][0])


def test_a_damaged_or_incomplete_checkpoint_is_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(checkpoint, copy)
    weights = copy / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or changed"):
        generate(copy)
    with pytest.raises(CheckpointError, match="no exported model here"):
        generate(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["foo", "", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_with_the_remedy(checkpoint: Path, device: str) -> None:
    with pytest.raises(GenerateError, match=rf"device is '{device}': .*; (use|choose) cpu"):
        generate(checkpoint, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(GenerateError, match=r"device is 'cuda': torch .* sees no such device here; use cpu"):
        Generator.load(tmp_path / "nowhere", device="cuda")
