"""Small samples of media corpora in the real layouts, written by the formats' own libraries where there are such."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from PIL import Image

COUNT = 6
"""Documents of each sample."""


@cache
def picture(number: int, format: str = "png") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@cache
def sound(number: int, format: str = "WAV") -> bytes:
    tone = np.sin(np.arange(1600) * 0.1 * (number + 1)) * 0.4
    file = io.BytesIO()
    soundfile.write(file, tone.astype(np.float32), 8000, format=format)
    return file.getvalue()


def caption(number: int) -> str:
    return f"the fox number {number}"


def media_folder(folder: Path) -> dict[str, Any]:
    for i in range(COUNT):
        (folder / f"{i}.jpg").write_bytes(picture(i, "jpeg"))
        (folder / f"{i}.json").write_text(json.dumps({"caption": caption(i)}))
        (folder / f"{i}.flac").write_bytes(sound(i, "FLAC"))
    return {"reader": "media_folder", "path": str(folder), "json_field": "caption"}


def web_dataset(folder: Path, pattern: str = "train-%04d.tar") -> dict[str, Any]:
    """As img2dataset writes it, with more beside."""
    with webdataset.ShardWriter(str(folder / pattern), maxcount=4, verbose=0) as writer:
        for i in range(COUNT):
            described = json.dumps({"url": "http://x", "caption": caption(i), "meta": {"language": "en"}})
            extra = {"npy": b"\x93NUMPY", "cls": b"3", "pyd": b"\x80\x04c"}
            writer.write(
                {"__key__": f"{i:05}", "jpg": picture(i, "jpeg"), "txt": caption(i), "json": described} | extra
            )
    return {"reader": "webdataset", "path": str(folder)}


def parquet(folder: Path) -> dict[str, Any]:
    """As `Dataset.to_parquet` of the library datasets writes it."""
    from datasets import Audio, Dataset, Features, List, Value, disable_progress_bars
    from datasets import Image as ImageFeature

    disable_progress_bars()
    features = Features(
        {
            "image": ImageFeature(),
            "audio": Audio(sampling_rate=8000),
            "captions": List(Value("string")),
            "meta": {"id": Value("string"), "language": Value("string")},
        }
    )
    rows = {
        "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(COUNT)],
        "audio": [{"bytes": sound(i), "path": None} for i in range(COUNT)],
        "captions": [[caption(i), f"another {i}"] for i in range(COUNT)],
        "meta": [{"id": f"row{i}", "language": "en"} for i in range(COUNT)],
    }
    Dataset.from_dict(rows).cast(features).to_parquet(folder / "train-00000-of-00001.parquet", batch_size=4)
    fields = {"text_field": "captions", "image_field": "image", "audio_field": "audio", "id_field": "meta.id"}
    return {"reader": "parquet", "path": str(folder)} | fields


def librispeech(folder: Path) -> dict[str, Any]:
    """One subset of two chapters."""
    for chapter in (121123, 121550):
        below = folder / f"LibriSpeech/dev-clean/84/{chapter}"
        below.mkdir(parents=True)
        names = [f"84-{chapter}-{i:04}" for i in range(COUNT // 2)]
        for i, name in enumerate(names):
            (below / f"{name}.flac").write_bytes(sound(i, "FLAC"))
        lines = [f"{name} {caption(i).upper()}\n" for i, name in enumerate(names)]
        (below / f"84-{chapter}.trans.txt").write_text("".join(lines))
    (folder / "LibriSpeech/SPEAKERS.TXT").write_text("; some pipe-separated values\n")
    return {"reader": "librispeech", "path": str(folder)}


def common_voice(folder: Path) -> dict[str, Any]:
    """Two locales of a release of version 17 and later."""
    columns = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant"
    for locale in ("de", "pt-BR"):
        clips = folder / f"cv-corpus-17.0/{locale}/clips"
        clips.mkdir(parents=True)
        lines = ["\t".join([*columns.split(), "locale", "segment"])]
        for i in range(COUNT // 2):
            name = f"common_voice_{locale}_{i}.mp3"
            (clips / name).write_bytes(sound(i, "MP3"))
            cells = ["a1", name, "b2", f'"{caption(i)}', "", str(2 + i), "1", "", "", "", "", locale, ""]
            lines.append("\t".join(cells))
        for split in ("validated", "invalidated", "train"):
            (clips.parent / f"{split}.tsv").write_text("\n".join(lines if split != "train" else lines[:2]) + "\n")
    return {"reader": "common_voice", "path": str(folder / "cv-corpus-17.0")}


def coco(folder: Path) -> dict[str, Any]:
    """The layout of the release of 2017; the annotations of a picture do not stand together."""
    (folder / "annotations").mkdir()
    (folder / "val2017").mkdir()
    names = [f"{i:012}.jpg" for i in range(COUNT)]
    for i, name in enumerate(names):
        (folder / "val2017" / name).write_bytes(picture(i, "jpeg"))
    described = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"url": "http://x", "id": 1, "name": "x"}],
        "images": [{"license": 1, "file_name": name, "id": 100 + i} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 100 + i, "id": j * 10 + i, "caption": f"{caption(i)}, said {j}\n"}
            for j in range(2)
            for i in range(COUNT)
        ],
    }
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(described))
    (folder / "annotations/instances_val2017.json").write_text("{}")
    return {"reader": "coco", "path": str(folder)}
