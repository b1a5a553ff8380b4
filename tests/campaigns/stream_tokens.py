"""Stream many tokens through the loader and watch what the process holds.

    python -m tests.campaigns.stream_tokens DATASET --tokens 200_000_000

Prints, for each tenth of the way, resident memory, open descriptors, threads and segments of shared memory. Ends with 1 if
memory after the first three tenths grows by more than a window, or a descriptor, a thread or a segment is left when the
loader is closed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
from dataclasses import astuple, dataclass
from pathlib import Path

from pipelines.loading import Index, Loader
from pipelines.shards.dataset import Dataset


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    resident_mb: float
    descriptors: int
    threads: int
    segments: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident_mb=pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            threads=threading.active_count(),
            segments=Path("/proc/self/maps").read_text().count("/dev/shm"),
        )


def stream(dataset: Dataset, tokens: int, *, sequence_length: int, window_tokens: int, workers: int) -> list[Held]:
    """What is held before, at each tenth of so many tokens, and after the loader is closed."""
    index = Index.build(dataset, sequence_length).split(validation=False)
    held = [Held.now()]
    seen = 0
    with Loader(index, sequences=8, micro_batch=8, seed=0, window_tokens=window_tokens, workers=workers) as loader:
        for tenth in range(1, 11):
            while seen < tokens * tenth / 10:
                seen += next(loader).tokens
            held.append(Held.now())
    return [*held, Held.now()]


def leak(held: list[Held], most_mb: float) -> str:
    """What was not given back, or ""."""
    before, after, running = held[0], held[-1], held[3:-1]
    if after.descriptors > before.descriptors or after.threads > before.threads or after.segments > before.segments:
        return f"left when the loader was closed: {after}, before it was opened: {before}"
    grown = max(h.resident_mb for h in running) - running[0].resident_mb
    return f"resident memory grew by {grown:.0f} MB after the first three tenths" if grown > most_mb else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--window-tokens", type=int, default=4_000_000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    held = stream(
        Dataset.open(arguments.dataset),
        arguments.tokens,
        sequence_length=arguments.sequence_length,
        window_tokens=arguments.window_tokens,
        workers=arguments.workers,
    )
    print("resident MB, descriptors, threads, segments of shared memory")
    for moment in held:
        print("{:.0f}, {}, {}, {}".format(*astuple(moment)))
    if found := leak(held, most_mb=5 * 4):
        sys.exit(found)


if __name__ == "__main__":
    main()
