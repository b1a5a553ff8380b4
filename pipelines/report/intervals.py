"""Values with their intervals, one a line, as a chart: what is beyond chance lies clear of zero.

Enters: names, values and bounds. Leaves: `Markup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.charts import WIDTH, short, svg, ticks
from pipelines.report.markup import Markup, tag

_LEFT, _RIGHT, _TOP, _LINE, _BOTTOM = 118, 16, 10, 26, 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One line of the chart."""

    name: str
    value: float
    interval: Sequence[float] | None
    """[low, high], where known."""
    tone: str = ""
    """The class that sets the colour, such as `image`."""


def interval_chart(key: str, title: str, description: str, estimates: Sequence[Estimate], *, x_label: str) -> Markup:
    """Points with bars over one axis, on which 0 is marked.

    Args:
        key: unique on the page.
        estimates: at least one.
    """
    reached = [value for e in estimates for value in (e.value, *(e.interval or ()))]
    placed = ticks(min(0.0, *reached), max(0.0, *reached), 5)
    low, high = placed[0], placed[-1]
    bottom = _TOP + _LINE * len(estimates)

    def x(value: float) -> float:
        return round(_LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT), 1)

    parts: list[Markup] = []
    for tick in placed:
        parts.append(tag("line", x1=x(tick), x2=x(tick), y1=_TOP, y2=bottom, class_="zero" if tick == 0 else "grid"))
        parts.append(tag("text", short(tick), x=x(tick), y=bottom + 15, class_="tick middle"))
    parts.append(tag("text", x_label, x=WIDTH - _RIGHT, y=bottom + 30, class_="tick end"))
    for number, e in enumerate(estimates):
        y = _TOP + _LINE * number + _LINE // 2
        said = f"{e.name}: {e.value:+.3f}" + (f", {e.interval[0]:+.3f} to {e.interval[1]:+.3f}" if e.interval else "")
        reach = (
            tag("line", x1=x(e.interval[0]), x2=x(e.interval[1]), y1=y, y2=y, class_="reach") if e.interval else None
        )
        parts.append(
            tag("g", tag("title", said), reach, tag("circle", cx=x(e.value), cy=y, r=4, class_="dot"), class_=e.tone)
        )
        parts.append(tag("text", e.name, x=_LEFT - 10, y=y + 4, class_="tick end"))
    return svg(key, title, description, parts, (WIDTH, bottom + _BOTTOM), "chart")
