"""Decoded rows in a terminal: text as text, pictures as blocks where the terminal has colours, sounds as an outline.

Enters: a `ShownRow` and a console. Leaves: lines on it. Always holds: where there are no colours, such as in a file, a
picture is its size and a sound its length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.style import Style

from pipelines.decode import DecodedSpan
from pipelines.show import ShownRow

PICTURE_COLUMNS = 48
"""Characters of a picture's width; each shows two pixels, one over the other."""
_OUTLINE_COLUMNS = 48
_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLOURFUL = ("256", "truecolor")


def print_row(row: ShownRow, console: Console) -> None:
    """Print a row."""
    console.print(
        f"row {row.row_id[:12]} from {row.source}, {row.num_tokens:,} tokens",
        style="bold",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for span, file in zip(row.spans, row.files, strict=True):
        where = f"  -> {file}" if file else ""
        line = f"  {span.modality.label:5}  {span.describe()}{where}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        if console.is_terminal and console.color_system in _COLOURFUL:
            _draw(span, console)


def _draw(span: DecodedSpan, console: Console) -> None:
    if span.pixels is not None:
        console.print(Padding(blocks(span.pixels, min(PICTURE_COLUMNS, console.width - 9)), (0, 0, 0, 9)))
    elif span.waveform is not None and len(span.waveform):
        console.print(f"         {outline(span.waveform, _OUTLINE_COLUMNS)}", style="green", highlight=False)


def blocks(pixels: NDArray[np.uint8], columns: int) -> Segments:
    """A picture, uint8 [H, W, 3], as half blocks: the upper pixel is the character's colour, the lower its background."""
    from PIL import Image

    height, width = pixels.shape[:2]
    columns = max(1, min(columns, width))
    rows = max(2, round(height * columns / width / 2) * 2)
    small = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.LANCZOS))
    segments: list[Segment] = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            segments.append(Segment("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom))))
        segments.append(Segment.line())
    return Segments(segments)


def outline(waveform: NDArray[np.float32], columns: int) -> str:
    """How loud a sound is over time, scaled to its loudest moment; float32 [samples], at least one."""
    bars = min(columns, len(waveform))
    edges = np.linspace(0, len(waveform), bars + 1).astype(int)[:-1]
    loudness = np.maximum.reduceat(np.abs(waveform), edges)
    heights = np.ceil(loudness / max(float(loudness.max()), 1e-3) * 8).astype(int)
    return "".join(_BLOCKS[height] for height in heights.tolist())
