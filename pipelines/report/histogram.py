"""Histograms of lengths and sizes, as data, as a chart and as a line for the terminal.

Enters: how often each value occurs. Leaves: bins that are as wide as whole numbers where the range is small, and a fixed
ratio where it is large. Always holds: every counted thing lies in exactly one bin, and two histograms that are to be compared
share their edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pipelines.report.charts import HEIGHT, WIDTH, short, svg, ticks
from pipelines.report.markup import Markup, tag

Bin = tuple[int, int, int]
"""Its smallest value, its largest value, and how many things have one of these."""

_MOST_BINS = 28
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 12, 38
_LABELS = 6
"""Labels of the x axis, at most."""


def edges(low: int, high: int, most: int = _MOST_BINS) -> list[int]:
    """Where bins over low..high begin, and behind them where the last one ends.

    Returns:
        Ascending, the first no larger than `low`, the last larger than `high`.
    """
    if high - low < most:
        return list(range(low, high + 2))
    least = max(low, 1)
    octaves = math.log2((high + 1) / least)
    parts = max(1, min(8, int(most / octaves)))
    first, last = math.floor(math.log2(least) * parts), math.ceil(math.log2(high + 1) * parts)
    placed = sorted({round(2 ** (index / parts)) for index in range(first, last + 1)})
    # Rounding may take an edge across the ends of the range.
    return [min(placed[0], low), *placed[1:-1], max(placed[-1], high + 1)]


def histogram(counts: Mapping[int, int], within: Sequence[int] | None = None) -> list[Bin]:
    """Count values by bin.

    Args:
        counts: how often each value from 0 on occurs.
        within: edges that hold all values; chosen for these values by default.
    """
    if not counts:
        return []
    placed = within or edges(min(counts), max(counts))
    held = [0] * (len(placed) - 1)
    at = 0
    for value in sorted(counts):
        while value >= placed[at + 1] and at + 2 < len(placed):
            at += 1
        held[at] += counts[value]
    return [(placed[i], placed[i + 1] - 1, count) for i, count in enumerate(held)]


def bar_chart(
    key: str,
    title: str,
    description: str,
    bins: Sequence[tuple[int, int, float]],
    *,
    x_label: str,
    y_label: str,
    tone: str = "",
    other: Sequence[tuple[int, int, float]] = (),
    label: Callable[[int], str] = "{:,}".format,
) -> Markup:
    """Bars of equal width, one a bin.

    Args:
        key: unique on the page.
        bins: at least one: smallest and largest value, and a count, or any other height from 0 on.
        other: a second histogram with the same edges, drawn as an outline over the first.
        label: how a value is written under the x axis.
    """
    top = ticks(0, max(count for *_, count in [*bins, *other]), 4)
    step = (WIDTH - _LEFT - _RIGHT) / len(bins)
    base = HEIGHT - _BOTTOM

    def height(count: float) -> float:
        return count / top[-1] * (base - _TOP)

    parts: list[Markup] = []
    for tick in top:
        y = round(base - height(tick), 1)
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(tick), x=_LEFT - 7, y=round(y + 3.5, 1), class_="tick end"))
    gap = 1.5 if step > 5 else 0.5
    for index, (low, high, count) in enumerate(bins):
        said = f"{_range(low, high)}: {count:,}"
        parts.append(
            tag("rect", tag("title", said), x=round(_LEFT + index * step + gap / 2, 1), y=round(base - height(count), 1),
                width=round(step - gap, 1), height=round(height(count), 1), class_="bar")
        )  # fmt: skip
    if other:
        path = f"M{_LEFT} {base}"
        for index, (*_, count) in enumerate(other):
            y = round(base - height(count), 1)
            path += f"L{_LEFT + index * step:.1f} {y}L{_LEFT + (index + 1) * step:.1f} {y}"
        parts.append(tag("path", d=f"{path}L{WIDTH - _RIGHT} {base}", class_="line outline"))
    parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
    parts += _x_labels(bins, step, label)
    parts.append(tag("text", x_label, x=WIDTH - _RIGHT, y=HEIGHT - 5, class_="tick end"))
    parts.append(tag("text", y_label, x=_LEFT, y=HEIGHT - 5, class_="tick"))
    return svg(key, title, description, parts, (WIDTH, HEIGHT), f"chart {tone}")


def _x_labels(bins: Sequence[tuple[int, int, float]], step: float, label: Callable[[int], str]) -> list[Markup]:
    """Under the middle of bins of one value; at the border where a wider bin begins."""
    single = all(low == high for low, high, _ in bins)
    # Powers of two are where a scale of ratios is read most easily.
    candidates = [i for i, (low, *_) in enumerate(bins) if single or low & (low - 1) == 0] or [0]
    every = math.ceil(len(candidates) / _LABELS)
    shift = step / 2 if single else 0.0
    return [
        tag(
            "text",
            label(bins[i][0]),
            x=round(_LEFT + i * step + shift, 1),
            y=HEIGHT - _BOTTOM + 16,
            class_="tick middle",
        )
        for i in candidates[::every]
    ]


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def spark(bins: Sequence[Bin]) -> str:
    """The histogram as one line of block characters; what is not empty is never blank."""
    most = max((count for *_, count in bins), default=0)
    blocks = " ▁▂▃▄▅▆▇█"
    return "".join(blocks[math.ceil(count / most * 8)] if most else " " for *_, count in bins)
