"""The model that ships with Braid draws and speaks as it comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from pipelines.generate import Sampling, generate
from pipelines.pretrain.export import SHIPPED, load_model, shipped_models


def test_a_caption_becomes_a_drawing_and_a_voice_and_the_same_bytes_again(tmp_path: Path) -> None:
    assert "spoken_drawings" in shipped_models()
    media = Sampling(temperature=0.9, guidance=2.0)
    made = [
        generate(
            "spoken_drawings",
            prompt=["en: red heart, shapes"],
            want=["image", "audio"],
            out=tmp_path / name,
            sampling={"image": media, "audio": media},
            seconds=0.5,
            seed=1,
        )[0]
        for name in ("one", "two")
    ]
    for first, second in zip(made[0].files, made[1].files, strict=True):
        assert first.read_bytes() == second.read_bytes()
    picture, voice = made[0].files
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(float)
    # A drawing on white: most of the edge is, and not all of the middle.
    assert np.median(pixels[0]) > 240
    assert pixels[32:96, 32:96].std() > 10
    waveform, rate_hz = soundfile.read(voice)
    assert (len(waveform), rate_hz) == (8000, 16_000)
    assert np.sqrt(np.mean(waveform**2)) > 1e-3


def test_it_is_small_and_says_how_it_was_made() -> None:
    assert (SHIPPED / "spoken_drawings/model.safetensors").stat().st_size < 40_000_000
    model, vocabulary, about = load_model("spoken_drawings")
    assert model.config.num_parameters() < 30_000_000
    assert about["recipe"]["steps"] == about["step"] == 2500
    assert about["tokenizers"]["image"]["checkpoint"] == "drawings"
    assert vocabulary.audio_codebooks == 4
