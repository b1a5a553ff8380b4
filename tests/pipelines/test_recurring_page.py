"""What a pipeline shows of its past: the page, the table, the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pipelines.recurring.history import render, row, status
from pipelines.recurring.page import write_page
from pipelines.recurring.state import StateError
from tests.pipelines.nightly import Nightly, recorded, recorded_nightly


@pytest.fixture
def nightly(tmp_path: Path) -> Nightly:
    """With three recorded runs, of which one failed with words that look like markup."""
    return recorded_nightly(tmp_path)


def test_the_page_shows_runs_durations_tokens_losses_and_failures(nightly: Nightly) -> None:
    page = write_page(nightly.state, "nightly").read_text()
    assert "Pipeline nightly" in page
    assert "5.500" in page
    assert "5.250" in page
    assert "run 3, tokenize: 20 s" in page
    assert "run 1, image: 100 tokens" in page
    assert "run 1, untold: 100 tokens" in page
    assert "failed to x.example" in page
    assert "export has failed in 2 runs in a row" in page
    assert page.index("run 3</th>") < page.index("run 1</th>")
    for name in ("durations", "tokens", "loss-text"):
        assert f'aria-labelledby="{name}-title"' in page


def test_the_page_asks_no_network_and_runs_nothing_that_came_from_a_run(nightly: Nightly) -> None:
    page = write_page(nightly.state, "nightly").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)


def test_a_pipeline_without_runs_has_a_page_too(tmp_path: Path) -> None:
    nightly = Nightly(tmp_path)
    assert "Pipeline nightly" in write_page(nightly.state, "nightly").read_text()


def test_the_table_and_the_rows_tell_the_same(nightly: Nightly) -> None:
    console = Console(width=100, record=True)
    render(nightly.state.records(), console)
    told = console.export_text()
    assert "run 2 failed: export: <script>alert(1)</script> & [bold]no disk[/bold]" in told
    rows = [row(record) for record in nightly.state.records()]
    assert [(r["run"], r["outcome"], r["loss"]) for r in rows] == [
        (3, "done", {"text": 5.25}),
        (2, "failed", {}),
        (1, "done", {"text": 5.5}),
    ]
    json.dumps(rows)


def test_the_status_says_where_it_stands(nightly: Nightly) -> None:
    found = status("nightly", nightly.recipe)
    assert found["last_run"]["run"] == 3
    assert (found["holder"], found["paused"], found["run_under_way"], found["installed"]) == (None, None, None, None)


def test_a_damaged_record_is_named_with_its_remedy(nightly: Nightly) -> None:
    file = nightly.state.runs / "000003.json"
    file.write_text("{")
    with pytest.raises(StateError, match=f"{file} is damaged: .*restore it from a copy"):
        status("nightly", nightly.recipe)
    file.write_text("{}")
    with pytest.raises(StateError, match="written by another version of Braid"):
        status("nightly", nightly.recipe)


def test_a_record_is_written_once(nightly: Nightly) -> None:
    assert not nightly.state.conclude(recorded(3, "lost"))
    record = nightly.state.record(3)
    assert record
    assert record.outcome == "done"
