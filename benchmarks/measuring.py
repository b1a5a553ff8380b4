"""What every benchmark shares: interleaved repetition, the median, and the closing JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable


def hardware() -> str:
    """Processor, cores, and the GPU where torch sees one."""
    import torch

    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{gpu}"


def medians(*sides: Callable[[], object], repeat: int) -> list[float]:
    """Median wall seconds of each side, run in turn so that a busy moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeat):
        for side, times in zip(sides, seconds, strict=True):
            began = time.perf_counter()
            side()
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


def result(what: str, ours: float, theirs: float, unit: str, *, checked: str) -> dict[str, object]:
    """One comparison; `checked` says how the two outputs were found equal."""
    return {
        "what": what,
        "ours": round(ours, 3),
        "theirs": round(theirs, 3),
        "unit": unit,
        "ratio": round(ours / theirs, 3),
        "hardware": hardware(),
        "checked": checked,
    }


def close(results: list[dict[str, object]]) -> None:
    """Print the last line of a benchmark."""
    print(json.dumps(results[0] if len(results) == 1 else results))
