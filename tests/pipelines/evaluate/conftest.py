"""A tiny dataset, a generator on it, and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipelines.evaluate import Evaluation, evaluate
from pipelines.generate import Generator
from pipelines.pretrain.export import export_model
from pipelines.pretrain.parallelize import join_ranks
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines import tiny
from tests.pipelines.evaluate.parts import make_model
from tests.pipelines.jobs import run_units


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="session")
def recipe(folder: Path) -> TokenizeRecipe:
    recipe = tiny.tiny_recipe(folder, "tokenizers.audio.max_frames=70", "validation_share=0.5")
    for number, sound in enumerate(sorted((folder / "stamps").glob("*.wav"))):
        # A headless Chromium does not play what is shorter than some tenths of a second.
        soundfile.write(sound, np.sin(np.arange(5000) / (9 + number)).astype(np.float32), 8000)
    # A document that is cut: longer than the context.
    (folder / "lines.jsonl").open("a").write(
        "".join(json.dumps({"text": f"the quick dog {n} " * 60}) + "\n" for n in range(4))
    )
    return recipe


@pytest.fixture(scope="session")
def dataset(recipe: TokenizeRecipe) -> Dataset:
    return run_units(recipe)


@pytest.fixture(scope="session")
def tokenizers(recipe: TokenizeRecipe) -> Tokenizers:
    return Tokenizers.load(recipe)


@pytest.fixture(scope="session")
def generator(dataset: Dataset, tokenizers: Tokenizers) -> Generator:
    return Generator(make_model(dataset.vocabulary), dataset.vocabulary, tokenizers, name="tiny")


@pytest.fixture(scope="session")
def checkpoint(dataset: Dataset, recipe: TokenizeRecipe, folder: Path) -> Path:
    about = {"step": 7, "tokens": 700, "tokenizers": recipe.tokenizers.model_dump(mode="json")}
    with join_ranks("cpu") as ranks:
        export_model(folder / "run/model", make_model(dataset.vocabulary), dataset.vocabulary, about, ranks)  # type: ignore[arg-type]
    return folder / "run"


@pytest.fixture(scope="session")
def found(generator: Generator, dataset: Dataset) -> Evaluation:
    return evaluate(generator, dataset.uri, samples=3)
