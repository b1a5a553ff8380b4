"""One GPU: a unit of work, whole, against the bare encode loop: `python -m benchmarks.gpu_unit`.

The unit callable reads a tar in WebDataset's layout, decodes, tokenizes (the caption, too), interleaves and writes a shard,
without Ray: the whole tar as one unit, and in units of 1 GiB and of 256 MiB (the default), of which it has several at a time,
as in a job. The bare loop encodes the same pictures or clips, which lie decoded in memory, and does nothing else. All codes
are compared. Pictures: JPEG of 256 x 256, VQGAN f16/16384 with random weights in float16. Sounds: WAV of 10 s (`--seconds`)
at 24 kHz, EnCodec at 6 kbps with random weights in float16x2. Both as in `image_encode` and `audio_encode`. Without a GPU
both networks are tiny, in float32.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from PIL import Image

from benchmarks import audio_encode, image_encode
from benchmarks.measuring import close, result
from benchmarks.natural_pictures import natural_pictures
from benchmarks.units import one_unit, units_at_once
from pipelines.corpus.pictures import fit_picture, load_picture
from pipelines.corpus.sounds import load_sound
from pipelines.sequence import Modality
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.worker import UnitWorker

RATE_HZ = 24_000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=16_384)
    parser.add_argument("--clips", type=int, default=6_144)
    parser.add_argument("--seconds", type=int, default=10, help="length of a clip")
    parser.add_argument("--decoders", type=int, nargs="*", default=[8, 14], help="processes that decode, one run each")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="an eighth of the files")
    arguments = parser.parse_args()
    share = 1 if ON_GPU and not arguments.quick else 8 if ON_GPU else 256
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:  # noqa: PTH112
        folder = Path(scratch)
        results = pictures(folder, arguments.pictures // share, arguments)
        results += sounds(folder, arguments.clips // share, arguments)
    close(results)


def pictures(folder: Path, count: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    config = image_encode.F16 if ON_GPU else image_encode.TINY
    side = config.resolution
    codes = side // config.downsampling
    made = natural_pictures(min(count, 4096), side, seed=1, device=DEVICE).cpu().numpy()
    files = encoded(made, jpeg)
    checkpoint = image_encode.random_checkpoint(folder / "image", config, {}, DEVICE)
    dtype = "float16" if ON_GPU else "float32"
    settings = {"image": {"checkpoint": str(checkpoint), "rows": codes, "columns": codes, "dtype": dtype}}
    worker = unit_worker(folder, "pictures", files, count, "jpg", settings)
    tokenizer = worker.tokenizers.image
    assert tokenizer
    with ThreadPoolExecutor() as pool:
        arrays = list(
            pool.map(lambda data: fit_picture(load_picture(data, "x"), side, multiple=config.downsampling), files)
        )
    items = [arrays[index % len(arrays)] for index in range(count)]
    return compare("pictures", worker, Modality.IMAGE, items, tokenizer.encode, 1, "images/s", arguments)


def sounds(folder: Path, count: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    clips = [sound(rng, arguments.seconds) for _ in range(min(count, 128))]
    files = encoded(clips, wav)
    heard = [load_sound(data, "x", RATE_HZ) for data in files]
    config = audio_encode.RELEASED if ON_GPU else audio_encode.TINY
    made = audio_encode.random_tokenizer(config, "linear", np.concatenate(heard[:64]), DEVICE)
    dtype = "float16x2" if ON_GPU else "float32"
    frames = 100 * arguments.seconds
    settings = {"audio": {"checkpoint": str(made.save(folder / "audio")), "max_frames": frames, "dtype": dtype}}
    worker = unit_worker(folder, "sounds", files, count, "wav", settings)
    tokenizer = worker.tokenizers.audio
    assert tokenizer
    items = [heard[index % len(heard)] for index in range(count)]

    def encode(waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        offsets = np.arange(tokenizer.n_q, dtype=np.int32) * tokenizer.codebook_size
        return [codes + offsets for codes in tokenizer.encode(waveforms)]

    what = f"sounds of {arguments.seconds} s"
    return compare(what, worker, Modality.AUDIO, items, encode, arguments.seconds, "audio-seconds/s", arguments)


def compare(
    what: str,
    worker: UnitWorker,
    modality: Modality,
    items: list[np.ndarray],
    encode: Callable[[list[np.ndarray]], Any],
    amount: float,
    unit: str,
    arguments: argparse.Namespace,
) -> list[dict[str, object]]:
    """The bare loop and each way of doing units, with each number of decoders, in turn."""
    total = amount * len(items)
    encode(items[:1024])
    bare: list[float] = []
    ways: dict[str, Callable[[UnitWorker], tuple[float, list[str]]]] = {"one unit": one_unit}
    ways |= {f"units of {mib} MiB": partial(units_at_once, size=mib * 2**20) for mib in (1024, 256)}
    units: dict[tuple[int, str], list[float]] = {(count, way): [] for count in arguments.decoders for way in ways}
    shards = Path(worker.recipe.dataset) / "shards"
    for _ in range(arguments.repeat):
        began = time.perf_counter()
        codes = encode(items)
        bare.append(time.perf_counter() - began)
        for (count, way), seconds in units.items():
            if worker.decoders != count:
                # Decoders stay from unit to unit, so their start is no part of one.
                worker.close()
                worker.decoders = count
                for name in one_unit(worker)[1]:
                    (shards / name).unlink()
            took, names = ways[way](worker)
            seconds.append(took)
            mine = np.concatenate([ids_of(shards / name, modality) for name in names])
            if not np.array_equal(mine, np.concatenate([np.asarray(item).reshape(-1) for item in codes])):
                raise SystemExit(f"{what}: the unit's codes are not those of the bare loop")
    results = []
    worker.close()
    for (count, way), seconds in units.items():
        rates = total / statistics.median(seconds), total / statistics.median(bare)
        name = f"{what}: {way} with {count} decoders / bare encode loop"
        results.append(result(name, *rates, unit, checked=f"codes of all {len(items):,} files equal"))
        print(results[-1], flush=True)
    return results


def ids_of(shard: Path, modality: Modality) -> np.ndarray:
    """All ids of a modality in a shard, which is then removed."""
    found = pq.read_table(shard, columns=["token_ids", "modality_ids"])
    shard.unlink()
    ids, modalities = (found[name].combine_chunks().flatten().to_numpy() for name in ("token_ids", "modality_ids"))
    return ids[modalities == modality]


def unit_worker(
    folder: Path,
    name: str,
    files: list[bytes],
    count: int,
    ending: str,
    tokenizers: dict[str, object],
    device: str = DEVICE.type,
) -> UnitWorker:
    """A worker, on the GPU if there is one, for one tar with `count` samples."""
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            for suffix, data in ((ending, files[index % len(files)]), ("txt", f"number {index} of many".encode())):
                info = tarfile.TarInfo(f"{index:07}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    recipe = TokenizeRecipe.model_validate(
        {
            "dataset": str(folder / f"{name}_tokens"),
            "sources": [{"name": name, "reader": "webdataset", "path": str(path)}],
            "tokenizers": tokenizers,
            "sequence_length": 65536,
            "units": {"bytes": 2**40, "inputs": 2**30},
            "cluster": {"gpus_per_worker": 1},
        }
    )
    return UnitWorker(recipe, device)


def encoded(items: Sequence[np.ndarray], encode: Callable[[np.ndarray], bytes]) -> list[bytes]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(encode, items))


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def wav(waveform: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()


def sound(rng: np.random.Generator, seconds: int) -> np.ndarray:
    """Noise under a moving envelope, with a few tones: float32 [samples]."""
    time_s = np.arange(seconds * RATE_HZ, dtype=np.float32) / RATE_HZ
    tones = sum(np.sin(2 * np.pi * rng.uniform(80, 2000) * time_s + rng.uniform(0, 6)) for _ in range(3))
    envelope = np.interp(time_s, np.linspace(0, seconds, 40), rng.uniform(0, 1, 40))
    return np.asarray(envelope * (0.05 * tones + 0.05 * rng.standard_normal(len(time_s))), np.float32)


if __name__ == "__main__":
    main()
