"""Charts as inline SVG: lines with axes and ticks, a bar of shares, a waveform.

Enters: numbers. Leaves: `Markup` that takes its colours from the page's style sheet, so that it follows the theme. Always
holds: a chart has a title and a description for those who do not see it, and no colour is the only sign of anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.report.markup import Markup, tag

Point = tuple[float, float]

WIDTH, HEIGHT = 380, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 50, 12, 38
_LABEL_HEIGHT = 12.0
_WAVE_WIDTH, _WAVE_HEIGHT, _WAVE_BARS = 240, 44, 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """(step, value), steps ascending from 0 or above."""
    style: str
    """Class for the style sheet: `train`, `validation`, `reference` or `shade-0` to `shade-7`."""
    label: str = ""
    """Written at the line's right end."""
    markers: bool = False


def line_chart(
    key: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    x_label: str = "step",
    tone: str = "",
    from_zero: bool = False,
) -> Markup:
    """A chart over steps, or over whatever counts up from 0.

    Args:
        key: unique on the page; the ids of title and description begin with it.
        description: what one sees in it, in a sentence with the figures.
        lines: at least one point in all.
        tone: the class that sets the colour, such as `text`.
        from_zero: let the y axis begin at 0.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([0.0] if from_zero else [])
    x_low, x_high = 0.0, max(xs)
    x_ticks, y_ticks = ticks(x_low, x_high, 5), ticks(min(ys), max(ys), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        return x, HEIGHT - _BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    parts: list[Markup] = []
    for tick in y_ticks:
        y = _round(place((x_low, tick))[1])
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(tick), x=_LEFT - 7, y=_round(y + 3.5), class_="tick end"))
    for tick in x_ticks:
        if tick <= x_high:
            x = _round(place((tick, y_low))[0])
            parts.append(tag("line", x1=x, x2=x, y1=HEIGHT - _BOTTOM, y2=HEIGHT - _BOTTOM + 4, class_="axis"))
            parts.append(tag("text", short(tick), x=x, y=HEIGHT - _BOTTOM + 16, class_="tick middle"))
    base = HEIGHT - _BOTTOM
    parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
    parts.append(tag("text", x_label, x=WIDTH - _RIGHT, y=HEIGHT - 5, class_="tick end"))
    parts.append(tag("text", y_label, x=_LEFT, y=HEIGHT - 5, class_="tick"))
    for line in lines:
        placed = [place(point) for point in line.points]
        parts.append(tag("path", d=_path(placed), class_=f"line {line.style}"))
        if line.markers:
            parts += [
                tag("circle", tag("title", f"{line.name}, {x_label} {x:,.0f}: {y:.3f}"), cx=_round(px), cy=_round(py), r=3.2,
                    class_=f"dot {line.style}")
                for (x, y), (px, py) in zip(line.points, placed, strict=True)
            ]  # fmt: skip
    labelled = [(line, place(line.points[-1])[1]) for line in lines if line.label and line.points]
    for (line, _), y in zip(labelled, _apart([y for _, y in labelled]), strict=True):
        parts.append(tag("text", line.label, x=WIDTH - _RIGHT + 7, y=_round(y + 3.5), class_=f"tag {line.style}"))
    return svg(key, title, description, parts, (WIDTH, HEIGHT), f"chart {tone}")


def share_bar(key: str, title: str, shares: Sequence[tuple[str, float]]) -> Markup:
    """One bar, split by shares that sum to 1; each name is the class that colours its piece."""
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares)
    parts, at = [], 0.0
    for name, share in shares:
        piece = tag("rect", x=_round(at * 1000), y=0, width=_round(share * 1000), height=14, class_=f"piece {name}")
        parts.append(piece)
        at += share
    return svg(key, title, said, parts, (1000, 14), "share", stretched=True)


def waveform(samples: NDArray[np.float32], sample_rate_hz: int) -> Markup:
    """The outline of a sound, scaled to its loudest sample.

    Args:
        samples: float32 [samples], at least one.
    """
    bars = min(_WAVE_BARS, len(samples))
    edges = np.linspace(0, len(samples), bars + 1).astype(int)[:-1]
    loudness = np.maximum.reduceat(np.abs(samples), edges)
    loudness = loudness / max(float(loudness.max()), 1e-3)
    middle, step = _WAVE_HEIGHT / 2, _WAVE_WIDTH / bars
    strokes = [
        f"M{(i + 0.5) * step:.1f} {middle - h:.1f}v{2 * h:.1f}"
        for i, h in enumerate(np.maximum(loudness * (middle - 2), 0.5).tolist())
    ]
    title = tag("title", f"Waveform, {len(samples) / sample_rate_hz:.2f} seconds")
    return tag(
        "svg",
        title,
        tag("path", d="".join(strokes)),
        viewBox=f"0 0 {_WAVE_WIDTH} {_WAVE_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        class_="wave",
    )


def thin(points: Sequence[Point], most: int = 240) -> tuple[list[Point], int]:
    """At most so many points, each the mean of equally many that follow one another (the last of fewer); and how many."""
    each = max(1, math.ceil(len(points) / most))
    groups = (points[at : at + each] for at in range(0, len(points), each))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups], each


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose a range, two at least."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / about))
    step = next((m * power for m in (1, 2, 5) if m * power * about >= spread), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # A product, not a sum, so that rounding does not pile up; + 0.0 makes -0 a 0.
    return [round(i * step, 12) + 0.0 for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number of few letters: 1.5k, 20M, 0.003, 2e-5."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    if value and abs(value) < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value:.4g}"


def svg(
    key: str,
    title: str,
    description: str,
    parts: Sequence[Markup],
    size: tuple[int, int],
    style: str,
    *,
    stretched: bool = False,
) -> Markup:
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *parts,
        viewBox=f"0 0 {size[0]} {size[1]}",
        preserveAspectRatio="none" if stretched else None,
        role="img",
        aria_labelledby=f"{key}-title",
        aria_describedby=f"{key}-desc",
        class_=style,
    )


def _path(points: Sequence[Point]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))


def _round(value: float) -> float:
    return round(value, 1)


def _apart(ys: Sequence[float]) -> list[float]:
    """Heights of labels in the same order, moved just so far that none lies over another."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    placed = [0.0] * len(ys)
    last = -math.inf
    for i in order:
        placed[i] = last = max(ys[i], last + _LABEL_HEIGHT)
    ceiling = float(HEIGHT - _BOTTOM)
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - _LABEL_HEIGHT
    return placed
