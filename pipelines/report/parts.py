"""Parts that several pages share: key figures, sections, how far the most used codes reach.

Enters: figures. Leaves: `Markup`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.report.charts import Line, line_chart
from pipelines.report.frame import Section
from pipelines.report.markup import Child, Markup, tag


def key_figures(*figures: tuple[str, str]) -> Markup:
    """Large numbers, each with what it is."""
    return tag("dl", *(tag("div", tag("dd", value), tag("dt", name)) for value, name in figures), class_="figures")


def coverage_chart(
    key: str, title: str, counts: Sequence[tuple[str, NDArray[np.int64]]], *, tone: str, what: str = "codes"
) -> Markup:
    """How much of the data the most used codes cover, one line a codebook.

    Args:
        counts: The codebook's name, and how often each code of it was used, [codes]; of at least one code.
        what: What its codes are called.
    """
    several = len(counts) > 1
    shades = np.linspace(0, 7, len(counts)).astype(int) if several else [""]
    lines = [
        Line(name=name, points=_coverage(used), style=f"shade-{shade}" if several else "")
        for (name, used), shade in zip(counts, shades, strict=True)
    ]
    size = max(len(used) for _, used in counts)
    lines.append(Line(name="all alike", points=[(0.0, 0.0), (float(size), 100.0)], style="reference"))
    halves = [int(np.searchsorted(np.cumsum(np.sort(used)[::-1]), used.sum() / 2)) + 1 for _, used in counts]
    middle = f"{halves[0]:,}" if min(halves) == max(halves) else f"{min(halves):,} to {max(halves):,}"
    said = f"Half of the data is covered by the {middle} most used of {size:,} {what}."
    chart = line_chart(
        key, title, said, lines, y_label="% of the data", x_label=f"most used {what}", tone=tone, from_zero=True
    )
    shaded = f"; from strong, codebook {counts[0][0]}, to faint, {counts[-1][0]}" if several else ""
    head = tag(
        "figcaption",
        tag("strong", title),
        tag("span", f"{said} Dashed: if all were used alike{shaded}.", class_="note"),
    )
    return tag("figure", head, chart, class_="panel")


def section(key: str, name: str, *children: Child) -> Section:
    """A section with its heading."""
    return key, name, tag("section", tag("h2", name, id=key), *children, aria_labelledby=key)


def _coverage(counts: NDArray[np.int64]) -> list[tuple[float, float]]:
    shares = np.cumsum(np.sort(counts)[::-1]) / max(int(counts.sum()), 1) * 100
    # Close together where the line is steep.
    ranks = np.unique(np.geomspace(1, len(counts), 100).round().astype(int))
    return [(0.0, 0.0), *((float(rank), float(shares[rank - 1])) for rank in ranks)]
