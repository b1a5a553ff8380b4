"""The sheet of a tokenizer: what is on it is what the tokenizer does, nothing leaves it, no name breaks it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipelines.corpus.pictures import fit_picture
from pipelines.report.frame import POLICY
from pipelines.report.parts import coverage_chart
from pipelines.tokenizers.audio_evaluation import figures_of
from pipelines.tokenizers.check import check, kind_of
from pipelines.tokenizers.check_audio import spectrogram
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.image_evaluation import evaluate
from pipelines.tokenizers.sheet import CheckError, spread
from pipelines.tokenizers.vqgan import ImageTokenizer
from tests.pipelines.tiny import audio_tokenizer, image_tokenizer, text_tokenizer

HOSTILE = "a<b> & 'c' onerror=x"
WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in "WIDTH")
"""As East Asian fonts have them."""


class Sheet(HTMLParser):
    """Tags, texts and media of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def media(self, tag: str) -> list[bytes]:
        sources = [attributes["src"] or "" for name, attributes in self.tags if name == tag]
        assert all(source.startswith("data:") for source in sources)
        return [base64.b64decode(source.partition(",")[2]) for source in sources]


def pictures_of(folder: Path, count: int = 9) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}{HOSTILE if index == 3 else ''}.png")
    return folder


def test_an_image_sheet_shows_originals_beside_what_the_codes_give(tmp_path: Path) -> None:
    data = pictures_of(tmp_path / "pictures")
    (data / "broken.png").write_bytes(b"no picture")
    name = str(image_tokenizer(tmp_path / "tiny"))
    sheet = Sheet(check(name, data, tmp_path / "out" / "sheet.html", items=4))
    tokenizer = ImageTokenizer.load(name)
    loaded = {
        path.name: fit_picture(np.array(Image.open(path)), 16, multiple=4) for path in sorted(data.glob("[0-9]*.png"))
    }
    figures = evaluate(tokenizer, np.stack(list(loaded.values())))
    assert f"{figures['psnr_db']:.2f} dB" in sheet.text
    assert f"{figures['codes_used']} of 32 codes used" in sheet.text
    assert f"dead: not used in these pictures {32 - figures['codes_used']}" in sheet.text
    assert "Left out: 1 files, the first: broken.png:" in sheet.text
    shown = [np.array(Image.open(io.BytesIO(png))) for png in sheet.media("img")]
    assert len(shown) == 4 * 3
    psnrs = [float(found) for found in re.findall(r"PSNR (\d+\.\d+) dB ·", sheet.text)]
    assert psnrs == sorted(psnrs)
    for original, copy, difference in zip(shown[::3], shown[1::3], shown[2::3], strict=True):
        assert any(np.array_equal(original, picture) for picture in loaded.values())
        np.testing.assert_array_equal(copy, tokenizer.decode(tokenizer.encode(original[None]))[0])
        assert (difference[(original != copy)] < 255).all()


def test_an_audio_sheet_lets_one_hear_the_original_and_each_depth(tmp_path: Path) -> None:
    data = tmp_path / "sounds"
    data.mkdir()
    rng = np.random.default_rng(0)
    for index, seconds in enumerate((0.3, 1.0, 5.0, 0.6)):
        wave = 0.3 * np.sin(np.arange(int(8000 * seconds)) * rng.uniform(0.05, 0.5))
        soundfile.write(data / f"{index}.wav", wave, 8000)
    name = str(audio_tokenizer(tmp_path / "tiny"))
    sheet = Sheet(check(name, data, tmp_path / "sheet.html", items=4))
    tokenizer = AudioTokenizer.load(name)
    waves = [soundfile.read(io.BytesIO(wav), dtype="float32") for wav in sheet.media("audio")]
    # The original, and 1, 2 and 3 codebooks.
    assert len(waves) == len(sheet.media("img")) == 4 * 4
    assert all(rate == 8000 for _, rate in waves)
    originals = {path.name: soundfile.read(path, dtype="float32")[0][: 4 * 8000] for path in sorted(data.iterdir())}
    captions = re.findall(r"(\d\.wav)(?:, the first 4 s of it)?", sheet.text)
    assert set(captions) == set(originals)
    for place, file in enumerate(captions):
        original, _, _, best = (wave for wave, _ in waves[4 * place : 4 * place + 4])
        np.testing.assert_allclose(original, originals[file], atol=1e-4)
        whole = soundfile.read(data / file, dtype="float32")[0]
        decoded = tokenizer.decode(tokenizer.encode([whole])[0])[: len(original)]
        np.testing.assert_allclose(best, decoded.clip(-1, 1), atol=1e-4)
    whole = soundfile.read(data / "1.wav", dtype="float32")[0]
    figures = figures_of(whole, tokenizer.decode(tokenizer.encode([whole])[0])[: len(whole)], 8000)
    assert f"mel {figures['mel_distance_db']:.2f} dB SI-SDR {figures['si_sdr_db']:.1f} dB" in sheet.text
    codes = np.concatenate(
        tokenizer.encode([soundfile.read(path, dtype="float32")[0] for path in sorted(data.iterdir())])
    )
    for q, column in enumerate(codes.T):
        used = len(np.unique(column))
        assert f" {q} {used} {16 - used} " in sheet.text


def test_a_text_sheet_shows_the_pieces_and_what_does_not_come_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"the quick brown fox\n\nfull {WIDE} letters\n<script>alert(1)</script> 🙂\n")
    # This model normalizes: what is wide comes back narrow.
    model = text_tokenizer(tmp_path / "tiny.model")
    sheet = Sheet(check(str(model), tmp_path / "a.txt", tmp_path / "sheet.html"))
    assert "3 of 3 lines of a.txt" in sheet.text
    assert "66.667%" in sheet.text
    assert "1 lines; where the first of them differ:" in sheet.text
    assert WIDE in sheet.text
    assert "WIDTH" in sheet.text
    assert not [name for name, _ in sheet.tags if name == "script"]
    pieces = [attributes for name, attributes in sheet.tags if name == "span" and attributes.get("class") == "byte"]
    assert len(pieces) >= 4
    assert "Longest in use" in sheet.text


def test_a_sheet_holds_all_it_shows_and_no_name_breaks_it(tmp_path: Path) -> None:
    sheet = Sheet(check(str(image_tokenizer(tmp_path / "tiny")), pictures_of(tmp_path / "p"), tmp_path / "s.html"))
    assert HOSTILE in sheet.text
    assert not [name for name, _ in sheet.tags if name in ("b", "script", "link", "iframe", "object")]
    for _, attributes in sheet.tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert not re.match(r"(https?:)?//", attributes.get("src") or attributes.get("href") or "")
    policies = [attributes["content"] for _, attributes in sheet.tags if "http-equiv" in attributes]
    assert policies == [POLICY]


def test_the_same_data_give_the_same_sheet(tmp_path: Path) -> None:
    name, data = str(image_tokenizer(tmp_path / "tiny")), pictures_of(tmp_path / "p")
    told: list[tuple[str, int, int]] = []
    one = check(name, data, tmp_path / "1.html", limit=5, watch=lambda *state: told.append(state)).read_bytes()
    assert check(name, data, tmp_path / "2.html", limit=5).read_bytes() == one
    assert told[-1] == ("encoding and decoding", 5, 5)
    assert b"5 of 9 pictures" in one


def test_the_kind_of_a_tokenizer_is_found_out(tmp_path: Path) -> None:
    image, audio = image_tokenizer(tmp_path / "image"), audio_tokenizer(tmp_path / "audio")
    (tmp_path / "text").mkdir()
    model = text_tokenizer(tmp_path / "text" / "x.model")
    (model.parent / "x.vocab").unlink()
    assert [kind_of(str(path))[0] for path in (image, audio, model, model.parent)] == ["image", "audio", "text", "text"]
    assert [kind_of(name)[0] for name in ("drawings", "speech", "mistral-v1")] == ["image", "audio", "text"]
    with pytest.raises(CheckpointError, match="no tokenizer 'nothing'"):
        kind_of("nothing")
    config = (image / "config.json").read_text()
    (image / "config.json").write_text(config.replace('"image"', '"smell"'))
    with pytest.raises(CheckpointError, match="kind 'smell'; known are image and audio"):
        kind_of(str(image))
    (image / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match='states no "kind"'):
        kind_of(str(image))


@pytest.mark.parametrize("name", ["drawings", "speech", "mistral-v1"])
def test_without_data_of_its_kind_there_is_no_sheet(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckError, match=r"nowhere: no such file or folder"):
        check(name, tmp_path / "nowhere", tmp_path / "sheet.html")
    (tmp_path / "data").mkdir()
    with pytest.raises(CheckError, match=r"data: no"):
        check(name, tmp_path / "data", tmp_path / "sheet.html")
    for suffix in ("png", "wav", "txt"):
        (tmp_path / "data" / f"broken.{suffix}").write_bytes(b"\xff\xff")
    with pytest.raises(CheckError, match=r"broken\."):
        check(name, tmp_path / "data", tmp_path / "sheet.html")
    assert not (tmp_path / "sheet.html").exists()


def test_items_are_spread_from_the_first_to_the_last() -> None:
    assert spread("abcdefghi", 3) == ["a", "e", "i"]
    assert spread("abc", 9) == ["a", "b", "c"]
    assert spread("abc", 1) == ["a"]
    assert spread("", 3) == []


def test_the_coverage_of_codes_is_what_the_chart_says() -> None:
    counts = np.array([50, 0, 30, 20, 0, 0])
    chart = coverage_chart("x", "Use", [("codes", counts)], tone="image")
    assert "Half of the data is covered by the 1 most used of 6 codes" in chart
    assert "the 2 most used" in coverage_chart("x", "Use", [("codes", np.array([4, 4, 4]))], tone="image")


def test_a_spectrogram_is_bright_where_the_tone_is() -> None:
    tone = (0.5 * np.sin(np.arange(16_000) * 2 * np.pi * 3000 / 16_000)).astype(np.float32)
    light = np.array(Image.open(io.BytesIO(spectrogram(tone, 16_000)))).sum(axis=2)
    assert light.shape[0] == 80
    profile = light[:, 10:-10].mean(axis=1)
    # High tones are at the top; 3 kHz of 8 lies above the middle of a mel scale.
    assert profile[:40].max() > 600
    assert profile[60:].max() < 200
