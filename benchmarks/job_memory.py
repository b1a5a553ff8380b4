"""Memory of the tokenize job over a corpus and over one 20 times larger: `python -m benchmarks.job_memory`.

Each job is the real command with two workers, in processes of its own; the peak of each process is what the kernel says
(VmHWM). The bound: a worker holds its tokenizers, one row group of 2 M tokens, and a window of at most 64 documents or 64 MiB
of decoded media and one document more (of at most 1 GiB); the driver holds the names of shards and some 150 bytes an input.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import yaml
from PIL import Image

from benchmarks.measuring import close, hardware
from pipelines.shards.dataset import Dataset

_KINDS = {"driver": "pipelines.cli", "worker": "ray::UnitWorker"}
"""What the command line of each holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=600, help="of the smaller corpus")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents")
    arguments = parser.parse_args()
    small = arguments.documents // (10 if arguments.quick else 1)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        peaks = {count: job(Path(scratch), count) for count in (small, small * arguments.times)}
    for kind in _KINDS:
        less, more = (max(peaks[count][kind]) for count in (small, small * arguments.times))
        results.append(
            {
                "what": f"peak memory of the {kind}: {small * arguments.times:,} documents / {small:,}",
                "ours": round(more / 2**20),
                "theirs": round(less / 2**20),
                "unit": "MiB",
                "ratio": round(more / less, 3),
                "hardware": hardware(),
                "checked": f"all {small * arguments.times:,} documents are in the dataset",
            }
        )
        print(results[-1])
    close(results)


def job(folder: Path, count: int) -> dict[str, list[int]]:
    """Run the command over so many documents; the peak bytes of each process, by kind."""
    write_corpus(folder / f"raw{count}", count)
    recipe = {
        "dataset": str(folder / f"tokens{count}"),
        "sources": [
            {"name": "media", "reader": "media_folder", "path": str(folder / f"raw{count}")},
        ],
        "tokenizers": {
            "image": {"checkpoint": "drawings", "rows": 4, "columns": 4},
            "audio": {"checkpoint": "speech", "n_q": 2, "max_frames": 50},
        },
        "sequence_length": 1024,
        "units": {"inputs": 100},
        "workers": 2,
    }
    (folder / f"{count}.yaml").write_text(yaml.safe_dump(recipe))
    marker = uuid.uuid4().hex
    peaks: dict[int, tuple[str, int]] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "tokenize", str(folder / f"{count}.yaml")],
        env=os.environ | {"BRAID_TRIAL": marker},
    ) as process:
        while process.poll() is None:
            for pid, kind, peak in processes(marker):
                peaks[pid] = kind, peak
            time.sleep(0.2)
    if process.returncode or Dataset.open(folder / f"tokens{count}").statistics().documents != count:
        raise SystemExit(f"the job over {count} documents did not end well")
    by_kind: dict[str, list[int]] = defaultdict(list)
    for kind, peak in peaks.values():
        by_kind[kind].append(peak)
    return by_kind


def processes(marker: str) -> list[tuple[int, str, int]]:
    """Drivers and workers of one job with their peaks so far."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"BRAID_TRIAL={marker}".encode() not in (entry / "environ").read_bytes():
                continue
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            status = (entry / "status").read_text()
        except OSError:
            # It has just ended.
            continue
        for kind, part in _KINDS.items():
            if part in command and "VmHWM:" in status:
                kilobytes = int(status.split("VmHWM:")[1].split()[0])
                found.append((int(entry.name), kind, 1024 * kilobytes))
    return found


def write_corpus(folder: Path, count: int) -> None:
    """Captioned pictures of 200 to 1,200 pixels, every fourth with a second of sound."""
    rng, words = random.Random(0), ["ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
    folder.mkdir()
    for number in range(count):
        side = rng.randint(200, 1200)
        picture = Image.effect_noise((side, side), 60).convert("RGB")
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=70)
        (folder / f"{number:06}.jpg").write_bytes(file.getvalue())
        (folder / f"{number:06}.txt").write_text(" ".join(rng.choices(words, k=rng.randint(5, 200))))
        if number % 4 == 0:
            noise = np.random.default_rng(number).standard_normal(16_000) * 0.1
            soundfile.write(folder / f"{number:06}.wav", noise, 16_000)


if __name__ == "__main__":
    main()
