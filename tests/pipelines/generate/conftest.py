"""A tiny generator and what it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.generate import Generator
from pipelines.pretrain.export import export_model
from pipelines.pretrain.parallelize import join_ranks
from pipelines.recipe import read_recipe
from pipelines.sequence import Vocabulary
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines import tiny
from tests.pipelines.generate.parts import make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny tokenizers, their recipe and a small corpus."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_corpus(folder, stamps=1, lines=1)
    tiny.write_recipe(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(folder: Path) -> TokenizeRecipe:
    return read_recipe(TokenizeRecipe, folder / "recipe.yaml")


@pytest.fixture(scope="session")
def tokenizers(recipe: TokenizeRecipe) -> Tokenizers:
    return Tokenizers.load(recipe)


@pytest.fixture(scope="session")
def vocabulary(tokenizers: Tokenizers, recipe: TokenizeRecipe) -> Vocabulary:
    """Images are 4 x 4 codes of 32, audio 2 codebooks of 16 at 100 Hz in spans of at most 40 frames."""
    return tokenizers.vocabulary(recipe)


@pytest.fixture(scope="session")
def generator(vocabulary: Vocabulary, tokenizers: Tokenizers) -> Generator:
    return Generator(make_model(vocabulary).double(), vocabulary, tokenizers, name="tiny")


@pytest.fixture(scope="session")
def checkpoint(vocabulary: Vocabulary, recipe: TokenizeRecipe, folder: Path) -> Path:
    about = {"step": 7, "tokenizers": recipe.tokenizers.model_dump(mode="json")}
    with join_ranks("cpu") as ranks:
        export_model(folder / "run/model", make_model(vocabulary), vocabulary, about, ranks)  # type: ignore[arg-type]
    return folder / "run"
