"""Drawings with spoken captions, made from a small package of our own; no network."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipelines.corpus import spoken_drawings
from pipelines.corpus.documents import Document
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.espeak import speak, voices
from pipelines.corpus.spoken_drawings import caption, prepare
from pipelines.corpus.webdataset import WebDatasetSource
from pipelines.sequence import Modality
from tests.pipelines.reading import everything

NAMES = ("animals/birds/red_parrot_02", "animals/Cat", "shapes/star_95pt06step", "unsorted/v1.2-box", "food/apple")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    root = tmp_path / "packages/openclipart-png/usr/share/openclipart/png"
    for index, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (300, 40 * (index + 1)), (255, 0, 0, 100)).save(f"{root / name}.png")
    return tmp_path / "packages"


def _documents(folder: Path) -> list[Document]:
    source = WebDatasetSource.model_validate(
        {"reader": "webdataset", "name": "d", "path": str(folder), "language_field": "language"}
    )
    found = everything(source)
    assert all(isinstance(item, Document) for item in found)
    return [item for item in found if isinstance(item, Document)]


def test_captions_are_the_words_of_names_and_folders() -> None:
    assert [caption(name) for name in NAMES] == [
        "red parrot, birds, animals",
        "cat, animals",
        "star 95 pt 06 step, shapes",
        "v 1 2 box",
        "apple, food",
    ]
    assert caption("cards/7") == "7, cards"


def test_each_voice_is_a_document_and_a_drawing_keeps_its_identity(packages: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", tmp_path, speakers=["de", "en"], packages_folder=packages, processes=1)
    documents = _documents(out)
    assert [document.language for document in documents] == ["de"] * 5 + ["en"] * 5
    assert [d.source for d in documents[:5]] == [d.source for d in documents[5:]]
    assert len({document.row_id for document in documents}) == 10
    parrot = documents[1]
    assert parrot.source == "d/0000.tar#animals/birds/red_parrot_02"
    text, picture, sound = parrot.spans
    assert (text.text, picture.modality, sound.modality) == (
        "red parrot, birds, animals",
        Modality.IMAGE,
        Modality.AUDIO,
    )
    with Image.open(io.BytesIO(picture.content)) as opened:
        assert (opened.size, opened.mode) == ((128, 17), "RGBA")
    waveform, rate_hz = soundfile.read(io.BytesIO(sound.content))
    assert rate_hz == 16_000
    assert 0.5 < len(waveform) / rate_hz < 10
    assert 0.01 < np.sqrt(np.mean(waveform**2)) < 0.5
    assert sound.content != documents[6].spans[2].content


def test_the_same_bytes_come_out_again_and_what_is_missing_is_made(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spoken_drawings, "_DRAWINGS", 2)
    out = prepare(tmp_path / "out", tmp_path, speakers=["fr"], packages_folder=packages, processes=1)
    tars = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    assert sorted(tars) == ["0000.tar", "0001.tar", "0002.tar"]
    (out / "0001.tar").unlink()
    stamp = (out / "0000.tar").stat().st_mtime_ns
    prepare(out, tmp_path, speakers=["fr"], packages_folder=packages, processes=1)
    assert {file.name: file.read_bytes() for file in out.glob("*.tar")} == tars
    assert (out / "0000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(CorpusError, match=r"was made with .*'fr'.* now it is .*'de'.*name another folder"):
        prepare(out, tmp_path, speakers=["de"], packages_folder=packages)


def test_a_drawing_that_is_too_large_is_left_out(packages: Path, tmp_path: Path) -> None:
    root = packages / "openclipart-png/usr/share/openclipart/png"
    Image.new("1", (20_000, 10_000)).save(root / "food/wall.png")
    Image.new("1", (11_000, 10_000)).save(root / "food/floor.png")
    out = prepare(tmp_path / "out", tmp_path, speakers=["en"], packages_folder=packages, processes=1)
    assert len(_documents(out)) == 5


def test_fewer_drawings_are_spread_over_the_folders(packages: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", tmp_path, speakers=["en"], drawings=3, packages_folder=packages, processes=1)
    assert json.loads((out / "spoken-drawings.json").read_text()) == {"voices": ["en"], "drawings": 3, "of": 5}
    assert len(_documents(out)) == 3


def test_bad_wishes_are_refused(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"espeak-ng has no voice klingonese; it has .*de.*en-US"):
        prepare(tmp_path / "out", tmp_path, speakers=["klingonese"], packages_folder=packages)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").touch()
    with pytest.raises(CorpusError, match="holds something that is no such corpus"):
        prepare(tmp_path / "mine", tmp_path, speakers=["en"], packages_folder=packages)
    assert {"de", "en", "en-US", "fr"} <= set(voices())
    with pytest.raises(CorpusError, match="espeak-ng has none of that name"):
        list(speak(["a"], "klingonese"))
