"""Aspect buckets: the few shapes that pictures are scaled to within a budget of codes.

Enters: the budget, rows times columns, and a picture's size. Leaves: the rows and columns of codes that the picture gets.
Always holds: the buckets depend on the budget alone, no shape exceeds it or 64 codes a side, and a shape's portrait is
there where its landscape is.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

from pipelines.sequence import MAX_NUMBER

ASPECTS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1), (4, 1))
"""Width to height of what cameras and screens make, and of banners. With their portraits they are 15: few, so that
pictures of one shape fill a batch. Pictures beyond 4:1 are cropped to it."""


@cache
def buckets(rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """The shapes (rows, columns) of a budget, widest first; at most 15, fewer where a small budget makes some alike."""
    wide = {_shape(rows * columns, width, height) for width, height in ASPECTS}
    both = wide | {(across, down) for down, across in wide}
    return tuple(sorted(both, key=lambda shape: (Fraction(shape[0], shape[1]), shape)))


def nearest(shapes: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The shape whose aspect is nearest that of a picture, as a ratio of ratios; the widest of equals."""

    def apart(shape: tuple[int, int]) -> Fraction:
        ratio = Fraction(shape[0] * width, shape[1] * height)
        return max(ratio, 1 / ratio)

    return min(shapes, key=apart)


def _shape(budget: int, width: int, height: int) -> tuple[int, int]:
    """The shape in which a picture of this aspect, whole, covers most codes; of equals the one of fewest codes."""

    def covered(shape: tuple[int, int]) -> tuple[int, int]:
        return min(shape[0] * width, shape[1] * height), -shape[0] * shape[1]

    shapes = ((down, across) for down in range(1, MAX_NUMBER + 1) for across in range(1, MAX_NUMBER + 1))
    return max((shape for shape in shapes if shape[0] * shape[1] <= budget), key=covered)
