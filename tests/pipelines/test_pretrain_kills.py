"""A seeded part of the campaign `tests.campaigns.pretrain_kills`; its whole log is in docs/campaigns."""

import pytest

from tests.campaigns.pretrain_kills import run


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("worlds", [(1,), (2,)])
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(worlds: tuple[int, ...]) -> None:
    report: list[str] = []
    assert run(kills=6, seed=7, report=report, worlds=worlds) == [], report
