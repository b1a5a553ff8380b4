"""A seeded part of the campaign: the whole one is a script, and its log lies in docs/campaigns."""

import pytest

from tests.campaigns.tokenize_kills import run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_killed_again_and_again_leaves_the_undisturbed_dataset() -> None:
    report: list[str] = []
    assert run(5, seed=7, report=report) == []
    assert sum("equal" in line for line in report) == len(report)
