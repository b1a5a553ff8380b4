"""Bars over runs as inline SVG, beside the charts of `pipelines.report`.

Enters: numbers for each run. Leaves: `Markup` in the page's colours. Always holds: a bar says what it is when one points
at it, the chart says it for those who do not see it, and a colour is never the only sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.report.charts import HEIGHT, WIDTH, short, ticks
from pipelines.report.markup import Markup, tag

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38
_MOST_LABELS = 8


def stacked_bars(
    key: str, title: str, description: str, runs: Sequence[tuple[int, Mapping[str, float]]], *, y_label: str
) -> Markup:
    """One bar a run, of parts that are coloured by their names' classes.

    Args:
        key: unique on the page.
        runs: number of each run and its parts, in the order in which they are stacked.
    """
    top = ticks(0.0, max((sum(parts.values()) for _, parts in runs), default=0.0) or 1.0, 5)[-1]
    base, space = HEIGHT - _BOTTOM, WIDTH - _LEFT - _RIGHT
    step = space / max(len(runs), 1)
    width = max(1.0, min(step * 0.72, 26.0))
    drawn: list[Markup] = []
    for mark in ticks(0.0, top, 5):
        y = round(base - mark / top * (base - _TOP), 1)
        drawn.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid" if mark else "axis"))
        drawn.append(tag("text", short(mark), x=_LEFT - 7, y=y + 3.5, class_="tick end"))
    every = -(-len(runs) // _MOST_LABELS) or 1
    for index, (number, parts) in enumerate(runs):
        x, y = _LEFT + step * (index + 0.5), float(base)
        for name, value in parts.items():
            height = value / top * (base - _TOP)
            y -= height
            said = tag("title", f"run {number}, {name}: {short(round(value, 1))} {y_label}")
            place = {
                "x": round(x - width / 2, 1),
                "y": round(y, 2),
                "width": round(width, 1),
                "height": round(height, 2),
            }
            drawn.append(tag("rect", said, **place, class_=f"bar {name}"))
        if index % every == 0:
            drawn.append(tag("text", str(number), x=round(x, 1), y=base + 16, class_="tick middle"))
    drawn.append(tag("text", "run", x=WIDTH - _RIGHT, y=HEIGHT - 5, class_="tick end"))
    drawn.append(tag("text", y_label, x=_LEFT, y=HEIGHT - 5, class_="tick"))
    return _svg(key, title, description, drawn, (WIDTH, HEIGHT), "chart")


def _svg(key: str, title: str, description: str, parts: Sequence[Markup], size: tuple[int, int], style: str) -> Markup:
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *parts,
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        aria_labelledby=f"{key}-title",
        aria_describedby=f"{key}-desc",
        class_=style,
    )
