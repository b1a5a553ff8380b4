"""Preprocessing as a recipe states it: in the fingerprint, the same in any company, and bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus.documents import Document, RawSpan, Reject
from pipelines.corpus.filters import Filters
from pipelines.recipe import RecipeError, read_recipe
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.dataset import Dataset
from pipelines.tokenize import prepare as preparing
from pipelines.tokenize import worker as working
from pipelines.tokenize.prepare import prepare
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.windows import WindowSize
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.test_tokenize import run_units
from tests.pipelines.tiny import tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preprocessing")
    tiny_recipe(folder)
    return folder


def _recipe(folder: Path, *overrides: str) -> TokenizeRecipe:
    return read_recipe(TokenizeRecipe, folder / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("tokenizers.image.fit=buckets", "preprocessing.image.fit: pad, buckets"),
        ("tokenizers.image.rows=3", "preprocessing.image.rows: 4, 3"),
        ("tokenizers.image.background=[0, 0, 0]", "preprocessing.image.background: [255, 255, 255], [0, 0, 0]"),
        ("tokenizers.audio.loudness_db=-23", "preprocessing.audio.loudness_db: None, -23.0"),
        ("tokenizers.audio.max_frames=39", "preprocessing.audio.max_frames: 40, 39"),
    ],
)
def test_what_changes_codes_changes_the_fingerprint(folder: Path, override: str, difference: str) -> None:
    usual, other = (
        Tokenizers.load(recipe).vocabulary(recipe) for recipe in (_recipe(folder), _recipe(folder, override))
    )
    assert usual.differences(other) == [difference]
    assert usual.fingerprint != other.fingerprint
    assert Vocabulary.from_dict(other.to_dict()) == other


@pytest.mark.parametrize(
    "override",
    ["tokenizers.image.max_pixels=9", "tokenizers.audio.max_seconds=9", "tokenizers.text.max_characters=9"],
)
def test_what_only_refuses_documents_does_not(folder: Path, override: str) -> None:
    usual, other = _recipe(folder), _recipe(folder, override)
    assert Tokenizers.load(usual).vocabulary(usual) == Tokenizers.load(other).vocabulary(other)


@pytest.mark.parametrize("background", ["[256, 0, 0]", "[0, 0]", "white", "[0.5, 0, 0]"])
def test_a_background_is_three_levels(folder: Path, background: str) -> None:
    with pytest.raises(RecipeError, match=r"tokenizers\.image\.background"):
        _recipe(folder, f"tokenizers.image.background={background}")


def test_buckets_give_pictures_of_many_shapes_the_codes_that_each_has_alone(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    recipe = _recipe(
        tmp_path, "tokenizers.image.fit=buckets", f"sources=[{{name: p, reader: media_folder, path: {tmp_path}/p}}]"
    )
    (tmp_path / "p").mkdir()
    rng = np.random.default_rng(0)
    sizes = [(40, 40), (20, 80), (41, 40), (80, 20), (20, 80), (9, 300), (30, 48)]
    for index, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / "p" / f"{index}.png")
    dataset = run_units(recipe)
    found = {row["source"]: row for batch in dataset.read() for row in batch.to_pylist()}
    shapes = [(span["rows"], span["columns"]) for _, row in sorted(found.items()) for span in row["spans"]]
    assert shapes == [(4, 4), (2, 8), (4, 4), (8, 2), (2, 8), (2, 8), (3, 5)]
    worker = UnitWorker(recipe)
    for index in range(len(sizes)):
        alone = worker.tokenizers.image.encode(_pixels(worker, tmp_path / "p" / f"{index}.png")[None])[0]  # type: ignore[union-attr]
        row = found[f"p/{index}"]
        (span,) = row["spans"]
        assert row["token_ids"][span["start"] : span["start"] + span["length"]] == alone.ravel().tolist()


def _pixels(worker: UnitWorker, file: Path) -> np.ndarray:
    span = RawSpan(modality=Modality.IMAGE, data=file.read_bytes(), uri=file.name)
    prepared = prepare(
        Document(source="p", position=0, spans=(span,)), Filters(), worker.recipe.tokenizers, worker.tokenizers.shapes
    )
    assert isinstance(prepared, preparing.Prepared)
    payload = prepared.parts[0].payload
    assert isinstance(payload, np.ndarray)
    return payload


def test_windows_do_not_show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe(folder, "tokenizers.image.fit=buckets")
    rows = []
    for number, documents, size in ((0, 64, 2**26), (1, 1, 2**26), (2, 64, 3000)):
        monkeypatch.setattr(working, "ON_CPU", WindowSize(documents=documents, size=size))
        dataset = run_units(recipe.model_copy(update={"dataset": str(tmp_path / str(number))}))
        rows.append(sorted((row["row_id"], row["token_ids"]) for batch in dataset.read() for row in batch.to_pylist()))
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 42


def _prepared(folder: Path, document: Document, *overrides: str) -> object:
    recipe = _recipe(folder, *overrides)
    return prepare(document, Filters(), recipe.tokenizers, Tokenizers.load(recipe).shapes)


def test_a_text_over_its_limit_is_rejected(folder: Path) -> None:
    document = Document(source="s", position=3, spans=(RawSpan(modality=Modality.TEXT, text="x" * 10, uri="u"),))
    assert isinstance(_prepared(folder, document, "tokenizers.text.max_characters=10"), preparing.Prepared)
    reject = _prepared(folder, document, "tokenizers.text.max_characters=9")
    assert reject == Reject(
        source="s",
        position=3,
        reason="text: too long",
        error="u: 10 characters, over tokenizers.text.max_characters = 9; split it",
    )


def test_a_document_that_is_too_large_once_decoded_is_rejected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (folder / "stamps" / "s000.wav").read_bytes()
    spans = [RawSpan(modality=Modality.AUDIO, data=data, uri=f"{n}.wav") for n in range(3)]
    size = len(data) // 2 * 4
    monkeypatch.setattr(preparing, "MOST_BYTES", 2 * size)
    assert isinstance(_prepared(folder, Document(source="s", position=0, spans=tuple(spans[:2]))), preparing.Prepared)
    reject = _prepared(folder, Document(source="s", position=0, spans=tuple(spans)))
    assert isinstance(reject, Reject)
    assert reject.reason == "document: too large"
    assert "at 2.wav; split it into several" in reject.error


def test_a_picture_over_the_limit_of_the_recipe_is_rejected(folder: Path, tmp_path: Path) -> None:
    recipe = _recipe(folder, "tokenizers.image.max_pixels=500", f"dataset={tmp_path}/tokens", "error_budget=1")
    dataset = run_units(recipe)
    assert isinstance(dataset, Dataset)
    large = [
        f"stamps/{file.stem}"
        for file in sorted((folder / "stamps").glob("*.png"))
        if np.prod(Image.open(file).size) > 500
    ]
    rejects = dataset.quarantined()
    assert 0 < len(large) < 12
    assert sorted(row["source"] for row in rejects) == large
    assert {row["reason"] for row in rejects} == {"image: too many pixels"}


def test_the_recipe_names_who_encodes_text(folder: Path) -> None:
    engines = [
        Tokenizers.load(_recipe(folder, f"tokenizers.text.engine={e}")).text.engine for e in ("auto", "sentencepiece")
    ]
    assert engines[1] == "sentencepiece"
    assert engines[0] in ("gigatoken", "sentencepiece")


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_a_lower_precision_without_a_gpu_is_refused_before_the_run(folder: Path, modality: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"tokenizers\.{modality}\.dtype: float16 is for GPUs; set cluster\.gpus_per_worker"
    ):
        _recipe(folder, f"tokenizers.{modality}.dtype=float16")
    assert _recipe(folder, f"tokenizers.{modality}.dtype=float16", "cluster.gpus_per_worker=0.5")
