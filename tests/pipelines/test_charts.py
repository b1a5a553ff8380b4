"""What charts are made of: ticks, thinned lines, short numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.report.charts import short, thin, ticks
from pipelines.report.training import duration


@given(low=st.floats(-1e6, 1e6), spread=st.floats(1e-3, 1e6), about=st.integers(2, 9))
def test_ticks_are_few_even_and_enclose_the_range(low: float, spread: float, about: int) -> None:
    found = ticks(low, low + spread, about)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= low + spread - 1e-6 * step
    assert 2 <= len(found) <= about + 2
    assert np.allclose(np.diff(found), step)


def test_a_range_of_one_value_has_ticks() -> None:
    assert ticks(0, 0, 5) == [0, 0.2]
    assert len(ticks(7.3, 7.3, 5)) >= 2


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=700))
def test_thinning_keeps_the_mean_of_every_group(values: list[float]) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept, each = thin(points, 50)
    assert len(kept) == math.ceil(len(points) / each) <= 50
    for index, (_, mean) in enumerate(kept):
        assert mean == pytest.approx(float(np.mean(values[index * each : (index + 1) * each])), abs=1e-9)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (1500, "1.5k"), (2e7, "20M"), (7.6e9, "7.6B"), (0.003, "0.003"), (2e-5, "2e-5"), (-0.4, "-0.4")],
)
def test_numbers_on_axes_are_short(value: float, said: str) -> None:
    assert short(value) == said


@pytest.mark.parametrize(("seconds", "said"), [(3.21, "3.2 s"), (167, "2 min 47 s"), (7325, "2 h 2 min")])
def test_times_are_said_in_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said
