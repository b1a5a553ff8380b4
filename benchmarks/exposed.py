"""How long a GPU only communicates: from a profiler's trace.

Enters: a trace in Chrome's format, as `torch.profiler` exports it. Leaves: milliseconds. Always holds: what overlaps is
counted once; a kernel of NCCL counts from its start on the device, so waiting for a slower rank is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

Interval = tuple[float, float]

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order, as intervals that do not touch."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of their union."""
    return sum(end - start for start, end in merged(intervals))


def exposed_ms(events: Iterable[dict[str, object]]) -> dict[str, float]:
    """What a device did in a trace.

    Returns:
        Milliseconds: `communication` in which NCCL ran, `exposed` in which nothing else did, `computing` in which anything
        else did, `idle` in which nothing ran between the first kernel and the last.
    """
    travelling: list[Interval] = []
    computing: list[Interval] = []
    for event in events:
        if event.get("cat") not in _ON_DEVICE:
            continue
        start, duration = float(str(event["ts"])), float(str(event["dur"]))
        of_nccl = str(event["name"]).startswith("nccl")
        (travelling if of_nccl else computing).append((start, start + duration))
    everything = [*travelling, *computing]
    if not everything:
        return {}
    busy, whole = length(everything), max(end for _, end in everything) - min(start for start, _ in everything)
    # A trace counts in microseconds.
    return {
        "communication": length(travelling) / 1e3,
        "exposed": (busy - length(computing)) / 1e3,
        "computing": length(computing) / 1e3,
        "idle": (whole - busy) / 1e3,
    }


def read_trace(path: Path) -> list[dict[str, object]]:
    """The events of a trace file."""
    events: list[dict[str, object]] = json.loads(path.read_bytes())["traceEvents"]
    return events
