"""What `braid evaluate` measures with: intervals that hold, distances that are distances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluate.bootstrap import interval
from pipelines.evaluate.distances import edit_distance, mel_distance


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    held = 0
    for trial in range(100):
        counts = random.integers(1, 20, 80)
        sums = counts * 3.0 + random.normal(0, 1, 80) * np.sqrt(counts)
        bounds = interval(sums, counts, seed=trial)
        assert bounds
        held += bounds[0] <= 3.0 <= bounds[1]
    assert 86 <= held <= 100
    assert interval([1.0], seed=0) is None
    assert interval([1.0, 2.0], [0, 5], seed=0) is None


@given(st.text("ab ", max_size=7), st.text("ab ", max_size=7))
def test_edit_distance_is_a_distance(a: str, b: str) -> None:
    distance = edit_distance(a, b)
    assert (distance == 0) == (a == b)
    assert distance == edit_distance(b, a)
    assert abs(len(a) - len(b)) / max(len(a), len(b), 1) <= distance <= 1


def test_known_edit_distances() -> None:
    assert edit_distance("kitten", "sitting") == pytest.approx(3 / 7)
    assert edit_distance("", "abc") == 1


def _warped(a: np.ndarray, b: np.ndarray) -> float:
    """By the definition, cell by cell."""
    cost = np.abs(a[:, None] - b[None]).mean(-1)
    best: dict[tuple[int, int], tuple[float, int]] = {(-1, -1): (0.0, 0)}
    for i in range(len(a)):
        for j in range(len(b)):
            before = min(
                (best[p] for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in best), key=lambda found: found[0]
            )
            best[i, j] = before[0] + cost[i, j], before[1] + 1
    total, steps = best[len(a) - 1, len(b) - 1]
    return total / steps


def test_mel_distance_is_that_of_the_best_alignment() -> None:
    random = np.random.default_rng(0)
    for rows, columns in [(1, 1), (1, 7), (6, 2), (9, 9), (12, 20)]:
        a, b = random.normal(size=(rows, 5)), random.normal(size=(columns, 5))
        assert mel_distance(a, b) == pytest.approx(_warped(a, b))
    slow = np.repeat(random.normal(size=(10, 5)), 3, axis=0)
    assert mel_distance(slow, slow[::3]) == 0
