"""Files that are small and would be huge: a worker that meets one of each takes little more memory than before.

All in one process, one after the other, because the peak of a process only grows.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.pipelines.bad_media import chunk_of_png, picture_file, png_with
from tests.pipelines.test_pictures import _png_that_claims
from tests.pipelines.test_readers_compressed import frame, zipped, zst
from tests.pipelines.test_sound_files import encoded
from tests.pipelines.tiny import write_recipe

ZEROS = bytes(10_000_000)

GIF = picture_file(Image.new("P", (9, 9)), "GIF")


def hole(size: int) -> Callable[[Path], object]:
    """A file of nothing but zeros that takes no room."""

    def make(file: Path) -> None:
        with file.open("wb") as opened:
            opened.truncate(size)

    return make


def same_in_all_rows(file: Path) -> None:
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 2_000_000, "y"]))
    pq.write_table(pa.table({"text": cells}), file, compression="zstd", store_schema=False)


def flac_of_unknown_length() -> bytes:
    data = bytearray(encoded(np.zeros(3600 * 8000, np.int16), "FLAC", "PCM_16", 8000))
    info = int.from_bytes(data[18:26], "big")
    data[18:26] = (info >> 36 << 36).to_bytes(8, "big")
    return bytes(data)


def pax_of_a_gigabyte() -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    return info.tobuf() + bytes(2**20)


def large_picture(file: Path) -> None:
    Image.new("RGBA", (4000, 5000), (9, 9, 9, 99)).save(file, compress_level=1)


Bomb = tuple[str, dict[str, Any], bytes | Callable[[Path], object], str | None, int]

FOLDER: dict[str, Any] = {"reader": "media_folder"}
LINES: dict[str, Any] = {"reader": "jsonl"}
TARS: dict[str, Any] = {"reader": "webdataset"}

BOMBS: dict[str, Bomb] = {
    # File, settings, content, reason (None: it is read), megabytes: lines have 100 by default, files 256.
    "pixels": ("x.png", FOLDER, _png_that_claims(60_000, 60_000), "image: too many pixels", 20),
    "screen": ("x.gif", FOLDER, GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], "image: too many pixels", 20),
    "text-of-a-picture": (
        "x.png",
        FOLDER,
        png_with(chunk_of_png(b"zTXt", b"k\0\0" + zlib.compress(ZEROS * 20))),
        "image: damaged",
        20,
    ),
    "profile": (
        "x.png",
        FOLDER,
        png_with(chunk_of_png(b"iCCP", b"k\0\0" + zlib.compress(ZEROS * 20))),
        "image: damaged",
        20,
    ),
    "seconds": ("x.flac", FOLDER, flac_of_unknown_length(), "audio: too long", 60),
    "window": ("x.jsonl.zst", LINES, zst(b"\n") + frame(31), "archive: window too large", 20),
    "gigabyte-of-gzip": ("x.jsonl.gz", LINES, gzip.compress(ZEROS) * 100, "archive: bomb", 320),
    "gzip-in-gzip": ("x.jsonl.gz", LINES, gzip.compress(gzip.compress(ZEROS) * 100), "text: not UTF-8", 20),
    "zip": ("x.jsonl.zip", LINES, zipped(ZEROS * 30), "archive: bomb", 320),
    "zstd": ("x.jsonl.zst", LINES, zst(ZEROS) * 100, "archive: bomb", 320),
    "line-of-300-mb": ("x.jsonl", LINES, hole(300_000_000), "line: too long", 320),
    "text-of-300-mb": ("x.txt", FOLDER, hole(300_000_000), "file: too large", 300),
    "tar-of-gzip": ("x.tar.gz", TARS, gzip.compress(ZEROS) * 100, "archive: bomb", 20),
    "header-of-a-tar": ("x.tar", TARS, pax_of_a_gigabyte(), "tar: damaged", 20),
    "shared-value": (
        "x.parquet",
        {"reader": "parquet", "text_field": "text"},
        same_in_all_rows,
        "text: too long",
        60,
    ),
    "tiny-values": (
        "x.jsonl",
        LINES | {"max_line_mb": 5},
        b'{"n": [%s1]}' % (b"[]," * 1_600_000),
        "field: missing",
        130,
    ),
    "20-million-pixels": ("x.png", FOLDER, large_picture, None, 500),
}

PROGRAM = """
import json, sys
from pipelines.recipe import read_recipe
from pipelines.shards.writer import ShardWriter
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.units import grouped
from pipelines.tokenize.worker import UnitWorker
from tests.peak import forget_peak, peak_kb

recipe = read_recipe(TokenizeRecipe, sys.argv[1])
worker = UnitWorker(recipe)
for source in recipe.sources:
    forget_peak()
    before, seen = peak_kb(), set()
    for unit in grouped(source.name, source.inputs(), recipe.units):
        for item in worker.rows(unit):
            seen.add(getattr(item, "reason", None))
    print(json.dumps([source.name, sorted(map(str, seen)), (peak_kb() - before) // 1000]), flush=True)
"""


@pytest.mark.slow
def test_no_bomb_takes_more_memory_than_its_limit_says(tmp_path: Path) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    warm = tmp_path / "raw" / "warm"
    warm.mkdir(parents=True)
    (warm / "x.png").write_bytes(picture_file(Image.new("RGBA", (500, 500))))
    (warm / "x.wav").write_bytes(encoded(np.zeros(9000, np.float32), "WAV", "PCM_16", 16_000))
    (warm / "x.txt").write_text("a fox")
    recipe["sources"] = [{"name": "warm", "reader": "media_folder", "path": str(warm)}]
    for name, (file, settings, content, _, _) in BOMBS.items():
        (folder := tmp_path / "raw" / name).mkdir()
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            content(folder / file)
        recipe["sources"].append({"name": name, "path": str(folder)} | settings)
    recipe["units"] = {"bytes": 2**40}
    recipe["tokenizers"]["text"]["max_characters"] = 1_000_000
    recipe["tokenizers"]["audio"]["max_seconds"] = 600
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    _, *found = map(json.loads, done.stdout.splitlines())
    assert [name for name, *_ in found] == list(BOMBS)
    for name, reasons, megabytes in found:
        *_, reason, most = BOMBS[name]
        assert reasons == [str(reason)], name
        assert megabytes <= most, name
