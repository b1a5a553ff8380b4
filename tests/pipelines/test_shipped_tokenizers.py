"""The tokenizers that ship with Braid: what their cards promise, and that the files are those the cards speak of."""

import json

import numpy as np
import pytest

from pipelines.tokenizers.checkpoint import SHIPPED, checkpoint_sha256, shipped_names
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.vqgan import ImageTokenizer

MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_tokenizer_is_the_one_of_its_card_and_small(name: str) -> None:
    folder = SHIPPED / name
    card = json.loads((folder / "card.json").read_text())
    assert card["sha256"] == checkpoint_sha256(folder)
    assert (folder / "weights.safetensors").stat().st_size <= 10 * MEGABYTE
    assert card["sha256"] in (folder / "card.md").read_text()


def test_drawings_keeps_shape_and_colour() -> None:
    card = json.loads((SHIPPED / "drawings" / "card.json").read_text())["figures"]
    assert card["psnr_db"] > 25
    assert card["chroma_error"] < card["chroma_error_of_grey"] / 4
    tokenizer = ImageTokenizer.load("drawings")
    pixels = np.full((1, 128, 128, 3), 255, np.uint8)
    pixels[0, 30:100, 20:60] = (200, 30, 40)
    pixels[0, 50:110, 70:115] = (30, 80, 210)
    codes = tokenizer.encode(pixels)
    assert codes.shape == (1, 16, 16)
    again = tokenizer.decode(codes).astype(float)
    assert np.abs(again - pixels).mean() < 8
    assert np.abs(again[0, 45:85, 30:50].mean(axis=(0, 1)) - (200, 30, 40)).max() < 40
    assert np.abs(again[0, 65:95, 80:105].mean(axis=(0, 1)) - (30, 80, 210)).max() < 40


def test_speech_is_intelligible_and_every_codebook_adds_to_it() -> None:
    card = json.loads((SHIPPED / "speech" / "card.json").read_text())["held_out"]["by_n_q"]
    estoi = [card[n]["estoi"] for n in ("1", "2", "4", "8")]
    assert estoi[-1] >= 0.7
    assert estoi == sorted(estoi)
    whole = AudioTokenizer.load("speech")
    time = np.arange(16000) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 20)) * (0.2 + 0.1 * np.sin(25 * time))
    waveform = (0.3 * voice).astype(np.float32)
    errors = []
    for n_q in (1, 2, 4, 8):
        tokenizer = AudioTokenizer.load("speech", n_q=n_q)
        (codes,) = tokenizer.encode([waveform])
        assert codes.shape == (50, n_q)
        errors.append(float(np.square(tokenizer.decode(codes) - waveform).mean()))
    assert errors[-1] < errors[0] < float(np.square(waveform).mean())
    assert whole.n_q == 8
