"""What cannot be evaluated is refused, with the place and the remedy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.evaluate import EvaluateError, evaluate
from pipelines.generate import Generator
from pipelines.pretrain.checkpoint import CheckpointError
from pipelines.sequence import VocabularyError
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines import tiny
from tests.pipelines.evaluate.parts import make_model
from tests.pipelines.jobs import run_units


def test_another_vocabulary_is_refused_naming_what_differs(
    tokenizers: Tokenizers, dataset: Dataset, tmp_path: Path
) -> None:
    from pipelines.tokenizers.vqgan import ImageTokenizer

    image = ImageTokenizer.load(tiny.image_tokenizer(tmp_path / "image", seed=9))
    other = replace(dataset.vocabulary, image_sha256=image.sha256)
    generator = Generator(make_model(other), other, replace(tokenizers, image=image), name="runs/other")
    with pytest.raises(VocabularyError, match=r"(?s)runs/other and dataset .*image_sha256"):
        evaluate(generator, dataset.uri)


def test_a_checkpoint_without_a_modality_of_the_dataset_is_refused(tokenizers: Tokenizers, dataset: Dataset) -> None:
    preprocessing = {k: v for k, v in dataset.vocabulary.preprocessing.items() if k != "audio"}
    silent = replace(
        dataset.vocabulary, audio_codebook_size=0, audio_codebooks=0, audio_sha256="", preprocessing=preprocessing
    )
    generator = Generator(make_model(silent), silent, replace(tokenizers, audio=None), name="runs/mute")
    with pytest.raises(VocabularyError, match=r"audio_codebooks: 0, 2"):
        evaluate(generator, dataset.uri)


def test_a_split_without_documents_is_refused_with_the_remedy(
    generator: Generator, recipe: TokenizeRecipe, folder: Path
) -> None:
    empty = recipe.model_copy(update={"dataset": str(folder / "none"), "validation_share": 0.0})
    run_units(empty)
    with pytest.raises(
        EvaluateError, match=r"no document in the validation split \(validation_share is 0\).*--split train"
    ):
        evaluate(generator, empty.dataset)


def test_spans_that_a_checkpoint_cannot_take_are_refused(dataset: Dataset, tokenizers: Tokenizers) -> None:
    short = Generator(
        make_model(dataset.vocabulary, max_sequence_length=50), dataset.vocabulary, tokenizers, name="short"
    )
    with pytest.raises(EvaluateError, match=r"short takes at most 50 tokens at once.*a media span needs"):
        evaluate(short, dataset.uri)


def test_a_diverged_model_is_refused(dataset: Dataset, tokenizers: Tokenizers) -> None:
    model = make_model(dataset.vocabulary)
    model.final_norm.weight.data.fill_(torch.nan)
    with pytest.raises(EvaluateError, match="NaN or infinity"):
        evaluate(Generator(model, dataset.vocabulary, tokenizers), dataset.uri)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split is 'test': choose validation or train"),
        ({"limit": 0}, "limit is 0"),
        ({"samples": 1}, "samples is 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    generator: Generator, dataset: Dataset, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluateError, match=message):
        evaluate(generator, dataset.uri, **settings)


def test_a_checkpoint_that_is_none_is_refused(dataset: Dataset, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no exported model here"):
        evaluate(tmp_path, dataset.uri)
    copy = shutil.copytree(checkpoint, tmp_path / "run")
    weights = copy / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or changed"):
        evaluate(copy, dataset.uri)
