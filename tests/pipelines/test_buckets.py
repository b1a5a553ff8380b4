"""Aspect buckets: few shapes within a budget of codes, and the one for each picture."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.corpus.buckets import buckets, nearest
from pipelines.corpus.pictures import Pixels, fit_picture, fit_to_codes

sides = st.integers(1, 64)


@given(sides, sides)
@settings(deadline=None, max_examples=30)
def test_buckets_keep_the_budget_the_largest_side_and_their_number(rows: int, columns: int) -> None:
    shapes = buckets(rows, columns)
    assert 1 <= len(shapes) <= 15
    assert all(min(shape) >= 1 and max(shape) <= 64 and shape[0] * shape[1] <= rows * columns for shape in shapes)
    assert set(shapes) == {(across, down) for down, across in shapes}, "portrait and landscape alike"
    assert shapes == buckets(columns, rows), "the budget alone decides"


def test_the_buckets_of_the_usual_budgets_stay_as_they_are() -> None:
    """They are part of what a dataset's fingerprint stands for: a change is a new preprocessing version."""
    landscape = ((8, 32), (9, 27), (11, 22), (12, 21), (13, 19), (14, 18))
    assert buckets(16, 16) == (*landscape, (16, 16), *(shape[::-1] for shape in reversed(landscape)))
    wide = ((16, 64), (18, 54), (22, 44), (24, 42), (26, 39), (27, 36), (28, 35))
    assert buckets(32, 32) == (*wide, (32, 32), *(shape[::-1] for shape in reversed(wide)))


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_a_picture_gets_the_bucket_of_the_nearest_aspect(height: int, width: int) -> None:
    shapes = buckets(16, 16)
    down, across = nearest(shapes, height, width)
    ratios = [Fraction(r * width, c * height) for r, c in shapes]
    best = min(max(ratio, 1 / ratio) for ratio in ratios)
    chosen = Fraction(down * width, across * height)
    assert max(chosen, 1 / chosen) == best


def _gradient(height: int, width: int) -> Pixels:
    down, right = np.mgrid[0:height, 0:width]
    return np.stack([down * 255 // height, right * 255 // width, down * 0], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [(90, 160, (12, 21)), (160, 90, (21, 12)), (100, 100, (16, 16)), (30, 40, (14, 18)), (1, 20_000, (8, 32))],
)
def test_a_picture_is_scaled_to_its_bucket_and_cropped_in_the_middle(
    height: int, width: int, shape: tuple[int, int]
) -> None:
    picture = _gradient(height, width)
    fitted = fit_to_codes(picture, rows=16, columns=16, downsampling=8, fit="buckets")
    assert fitted.shape == (shape[0] * 8, shape[1] * 8, 3)
    np.testing.assert_array_equal(fitted, fit_picture(picture, fitted.shape[:2], multiple=8, mode="crop"))
    if max(height, width) < 1000:
        # Only the one direction that sticks out is cut, and no more than the aspects differ.
        kept = np.array([np.ptp(fitted[..., 0]), np.ptp(fitted[..., 1])]) / 255
        assert kept.max() > 0.95
        assert kept.min() > 0.85


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_without_buckets_every_picture_has_the_shape_of_the_recipe(fit: str) -> None:
    for height, width in ((10, 200), (200, 10), (33, 33)):
        picture = _gradient(height, width)
        fitted = fit_to_codes(picture, rows=4, columns=6, downsampling=8, fit=fit)  # type: ignore[arg-type]
        assert fitted.shape == (32, 48, 3)


def test_the_background_is_around_a_padded_picture() -> None:
    picture = np.asarray(Image.new("RGB", (40, 10), (200, 0, 0)))
    fitted = fit_to_codes(picture, rows=5, columns=5, downsampling=8, fit="pad", background=(1, 2, 3))
    assert (fitted[0] == (1, 2, 3)).all()
    assert (fitted[20] == (200, 0, 0)).all()
