"""What a unit costs the worker's own process and its decoders, without a GPU: `python -m benchmarks.unit_host`.

The unit callable goes the way that it goes beside a GPU (decoders are processes, stages are threads), over the tars of
`gpu_unit`. In place of the GPU stands what fills a batch in memory of its own, as pinned memory is filled, and has random
codes of the shapes that the released tokenizers give: 16 x 16 of 16,384 a picture, 75 frames of 8 codes of 1,024 a second. It
has them at once, and what is left is what a GPU would have to wait for; or it takes `--picture-ms` and `--clip-ms` for each
item, and what a unit takes beyond that is what a GPU of that speed would stand still. Printed are items a second,
milliseconds of CPU an item by thread of the worker's process, of the process that reads, of its decoders (`--decoders`
processes that share this machine's cores with it) and of the process that writes, and each stage alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks import audio_encode, gpu_unit
from benchmarks.measuring import close, hardware
from benchmarks.natural_pictures import natural_pictures
from benchmarks.units import one_unit, units_at_once, whole_unit
from pipelines.corpus.documents import Document
from pipelines.shards.schema import Row
from pipelines.shards.writer import ShardWriter
from pipelines.tokenize.layout import laid_out
from pipelines.tokenize.prepare import Prepared
from pipelines.tokenize.windows import Chunk, items_of
from pipelines.tokenize.worker import ON_GPU, UnitWorker
from pipelines.tokenizers import clip_batches, gpu_batches
from pipelines.tokenizers.checkpoint import write_checkpoint
from pipelines.tokenizers.encodec import BATCH_SIZES, AudioTokenizer
from pipelines.tokenizers.vqgan import GPU_BATCH, VQGAN, ImageTokenizer, ImageTokenizerConfig, TowerConfig

SIDE, CODES = 256, 16
"""Of a picture in pixels, and in codes of 16 x 16 pixels."""
SECONDS = 10
"""Of a clip."""
DISTINCT = 128
"""Files that repeat."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=8192)
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--decoders", type=int, default=max(1, (os.cpu_count() or 1) - 4))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--picture-ms", type=float, default=0.0, help="that encoding a picture shall take")
    parser.add_argument("--clip-ms", type=float, default=0.0)
    parser.add_argument(
        "--units-of", type=int, help="MiB, several at a time, as in a job (256 by default there), in place of one"
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the files")
    arguments = parser.parse_args()
    share = 8 if arguments.quick else 1
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:  # noqa: PTH112
        kinds = [
            ("pictures", pictures, arguments.pictures // share, arguments.picture_ms),
            ("clips", clips, arguments.clips // share, arguments.clip_ms),
        ]
        results = []
        for what, prepare, count, item_ms in kinds:
            worker = prepare(Path(scratch), count, item_ms)
            found = whole(what, worker, count, arguments)
            if item_ms:
                found["ms a unit beyond the encoder's"] = round(1e3 * count / found["rate"] - count * item_ms)
            results.append(found | {"stages": stages(worker, count)})
            print(results[-1], flush=True)
    close(results)


def whole(what: str, worker: UnitWorker, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Units, all stages at once: the median one of them."""
    worker.window, worker.decoders = ON_GPU, arguments.decoders
    run = partial(units_at_once, size=arguments.units_of * 2**20) if arguments.units_of else one_unit
    run(worker)
    units: list[tuple[float, dict[str, float], dict[str, float]]] = []
    for _ in range(arguments.repeat):
        before = _seconds_beside(worker)
        with seconds_by_thread() as threads:
            took, names = run(worker)
        beside = {name: seconds - before[name] for name, seconds in _seconds_beside(worker).items()}
        units.append((count / took, threads, beside))
        for name in names:
            (Path(worker.recipe.dataset) / "shards" / name).unlink()
    worker.close()
    worker.decoders = 0
    rate, threads, beside = sorted(units, key=lambda unit: unit[0])[len(units) // 2]
    return {
        "what": f"{what}: a unit beside a stand-in for the GPU, {arguments.decoders} decoders",
        "rate": round(rate, 1),
        "unit": f"{what}/s",
        "threads": {name: round(1e3 * seconds / count, 4) for name, seconds in sorted(threads.items())},
        "process": round(1e3 * sum(threads.values()) / count, 4),
        "beside": {name: round(1e3 * seconds / count, 4) for name, seconds in beside.items()},
        "times": f"ms of CPU, by thread of the process, of {what[:-1]}",
        "hardware": hardware(),
    }


def stages(worker: UnitWorker, count: int) -> dict[str, float]:
    """Each stage alone, on one thread: ms of CPU an item, the median of three times."""
    unit, found = whole_unit(worker), {}
    source, preparation = worker._reading.sources[unit.source], worker._reading.preparation

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        seconds = []
        for _ in range(3):
            began = time.process_time()
            result = stage()
            seconds.append(time.process_time() - began)
        found[name] = round(1e3 * statistics.median(seconds) / count, 4)
        return result

    def write() -> None:
        with ShardWriter(worker._storage, worker.vocabulary, unit.id, unit.record()) as writer:
            for row in rows:
                writer.add(row)
            written = writer.finish()
        (Path(worker.recipe.dataset) / "shards" / written.name).unlink()

    documents = [item for item in timed("read", lambda: list(source.read(unit.slices))) if isinstance(item, Document)]
    # All at once would not fit into memory: as many as a window has.
    documents = documents[: ON_GPU.documents]
    count, everything = len(documents), count
    prepared = timed("decode", lambda: [preparation.prepare(unit.source, item) for item in documents])
    assert all(isinstance(item, Prepared) for item in prepared)
    window = [Chunk.of(prepared)]
    codes = timed("fill batches", lambda: worker._stage(window)()())
    rows = timed("lay out", lambda: list(laid_out(items_of([window[0].items]), codes, worker.vocabulary)))
    assert all(isinstance(row, Row) for row in rows)
    rows = [row for _ in range(-(-everything // count)) for row in rows][:everything]
    count = everything
    timed("write", write)
    return found


def clips(folder: Path, count: int, item_ms: float) -> UnitWorker:
    rng = np.random.default_rng(0)
    made = [gpu_unit.sound(rng, SECONDS) for _ in range(min(count, DISTINCT))]
    config = replace(audio_encode.TINY, n_q=8, codebook_size=1024)
    random = audio_encode.random_tokenizer(config, "linear", np.concatenate(made), torch.device("cpu"))
    settings = {"audio": {"checkpoint": str(random.save(folder / "audio")), "max_frames": 1000}}
    files = gpu_unit.encoded(made, gpu_unit.wav)
    worker = gpu_unit.unit_worker(folder, "sounds", files, count, "wav", settings, "cpu")
    tokenizer = worker.tokenizers.audio
    assert tokenizer
    tokenizer._fast = cast("clip_batches.ClipBatches", StandInForClips(tokenizer, Device(item_ms)))
    return worker


def pictures(folder: Path, count: int, item_ms: float) -> UnitWorker:
    tower = TowerConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)
    config = ImageTokenizerConfig(
        encoder=tower, decoder=tower, z_channels=8, embed_dim=4, codebook_size=16384, resolution=SIDE
    )
    checkpoint = write_checkpoint(folder / "image", config.to_json(), VQGAN(config).state_dict())
    settings = {"image": {"checkpoint": str(checkpoint), "rows": CODES, "columns": CODES}}
    files = gpu_unit.encoded(natural_pictures(min(count, DISTINCT), SIDE, seed=1).numpy(), gpu_unit.jpeg)
    worker = gpu_unit.unit_worker(folder, "pictures", files, count, "jpg", settings, "cpu")
    tokenizer = worker.tokenizers.image
    assert tokenizer
    tokenizer._on_gpu = cast("gpu_batches.FixedBatches", StandInForPictures(tokenizer, Device(item_ms)))
    return worker


class Device:
    """How a GPU spends its time: on one batch after another, so long for each item."""

    def __init__(self, item_ms: float) -> None:
        self.item_ms = item_ms
        self.done: list[float] = []
        """When each batch is."""

    def take(self, count: int) -> None:
        began = max([time.perf_counter(), *self.done[-1:]])
        self.done.append(began + count * self.item_ms / 1e3)

    def wait(self, batch: int) -> None:
        """For a batch, counted from the last one back."""
        if len(self.done) >= batch:
            time.sleep(max(0.0, self.done[-batch] - time.perf_counter()))


class StandInForClips:
    """In the place of `ClipBatches`."""

    def __init__(self, tokenizer: AudioTokenizer, device: Device) -> None:
        self.hop, self.batch_size, self.device = tokenizer.hop, BATCH_SIZES["float16x2"], device
        shape = self.batch_size, tokenizer.frames(SECONDS * gpu_unit.RATE_HZ), tokenizer.n_q
        self.codes = np.random.default_rng(0).integers(0, tokenizer.codebook_size, shape, np.int32)
        self.staged = torch.zeros(self.batch_size, shape[1] * self.hop)

    def stage(self, waveforms: Sequence[np.ndarray]) -> Callable[[], Callable[[], list[np.ndarray]]]:
        frames = [-(-len(waveform) // self.hop) for waveform in waveforms]
        for indices in clip_batches.batches(frames, self.hop, self.batch_size):
            clip_batches.fill(self.staged[: len(indices)], [waveforms[index] for index in indices])
        return lambda: self.start(frames)

    def start(self, frames: list[int]) -> Callable[[], list[np.ndarray]]:
        self.device.take(len(frames))
        done = len(self.device.done)

        def result() -> list[np.ndarray]:
            self.device.wait(1 + len(self.device.done) - done)
            landed = self.codes.copy()
            return [landed[index % self.batch_size, :count] for index, count in enumerate(frames)]

        return result


class StandInForPictures:
    """In the place of `FixedBatches`."""

    def __init__(self, tokenizer: ImageTokenizer, device: Device) -> None:
        self.device = device
        shape = ON_GPU.documents, CODES, CODES
        self.codes = np.random.default_rng(0).integers(0, tokenizer.codebook_size, shape, np.int32)
        self.staged = torch.zeros(GPU_BATCH, SIDE, SIDE, 3, dtype=torch.uint8)

    def start(self, items: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        for start in range(0, len(items), GPU_BATCH):
            # There are two places for batches on the GPU, and one is filled while the other is computed.
            self.device.wait(2)
            gpu_batches.fill(self.staged, items[start : start + GPU_BATCH])
            self.device.take(GPU_BATCH)
        done = len(self.device.done)

        def result() -> np.ndarray:
            self.device.wait(1 + len(self.device.done) - done)
            return self.codes[: len(items)].copy()

        return result


@contextmanager
def seconds_by_thread() -> Iterator[dict[str, float]]:
    """CPU seconds of our threads by name, those that begin and end meanwhile, too; filled in at the end."""
    latest: dict[tuple[str, int], float] = {}
    first = {threading.get_native_id(): _seconds(f"/proc/self/task/{threading.get_native_id()}")}
    ended = threading.Event()

    def look() -> None:
        for thread in threading.enumerate():
            path = f"/proc/self/task/{thread.native_id}"
            if thread.native_id is not None and os.path.exists(path):  # noqa: PTH110
                name = thread.name.removeprefix("braid-").partition("_")[0]
                latest[name, thread.native_id] = _seconds(path) - first.get(thread.native_id, 0)

    def watch() -> None:
        while not ended.wait(0.02):
            look()

    watching = threading.Thread(target=watch, name="watching")
    watching.start()
    found: dict[str, float] = defaultdict(float)
    began = time.process_time()
    try:
        yield found
    finally:
        ended.set()
        watching.join()
        look()
        for (name, _), seconds in latest.items():
            found[name] += seconds
        # What was not seen: threads' last 20 ms, and those of libraries.
        found["rest"] = time.process_time() - began - sum(found.values())
        del found["watching"]


def _seconds_beside(worker: UnitWorker) -> dict[str, float]:
    """CPU seconds of the processes beside the worker, of all their threads, also of those that have ended."""
    assert worker._reading._beside
    assert worker._writing._process
    reader = worker._reading._beside.process.pid
    decoders = Path(f"/proc/{reader}/task/{reader}/children").read_text(encoding="ascii").split()
    return {
        "reader": _seconds_of(reader),
        "decoders": sum(map(_seconds_of, decoders)),
        "writer": _seconds_of(worker._writing._process.pid),
    }


def _seconds_of(process: int | str) -> float:
    """In hundredths."""
    stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
    return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def _seconds(task: str) -> float:
    """CPU seconds of a thread."""
    return int(Path(task, "schedstat").read_text(encoding="ascii").split()[0]) / 1e9


if __name__ == "__main__":
    main()
