"""Filters and weights: what is dropped, that it is counted by reason, and that nothing else is lost."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.corpus.documents import Document, Dropped, RawSpan
from pipelines.corpus.filters import Filters, draw
from pipelines.recipe import read_recipe
from pipelines.sequence import Modality
from pipelines.shards.schema import Row
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.units import grouped
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.tiny import tiny_recipe, write_corpus, write_recipe


def document(text: str = "", language: str = "") -> Document:
    span = RawSpan(modality=Modality.TEXT, text=text) if text else RawSpan(modality=Modality.IMAGE, data=b"x")
    return Document(source="s/a", position=0, spans=(span,), language=language)


@pytest.mark.parametrize(
    ("settings", "text", "language", "dropped"),
    [
        ({"min_characters": 4}, "abc", "", "min_characters"),
        ({"min_characters": 3}, "abc", "", None),
        ({"max_characters": 2}, "abc", "", "max_characters"),
        ({"min_characters": 4}, "", "", None),
        ({"languages": ["en"]}, "abc", "en-GB", None),
        ({"languages": ["pt-BR"]}, "abc", "pt_br", None),
        ({"languages": ["en"]}, "abc", "eng", "languages"),
        ({"languages": ["en"]}, "abc", "", "languages"),
    ],
)
def test_text_filters(settings: dict[str, Any], text: str, language: str, dropped: str | None) -> None:
    assert Filters(**settings).drops(document(text, language)) == dropped


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_picture_filters_do_not_care_for_orientation(height: int, width: int) -> None:
    filters = Filters(min_pixels=64, max_aspect=2)
    assert filters.drops_picture(height, width) == filters.drops_picture(width, height)
    kept = min(height, width) >= 64 and max(height, width) <= 2 * min(height, width)
    assert (filters.drops_picture(height, width) is None) == kept


def test_filters_that_nothing_passes_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"min_seconds 2\.0 exceeds max_seconds 1\.0"):
        Filters(min_seconds=2, max_seconds=1)


def test_draws_are_uniform_and_depend_on_the_key_alone() -> None:
    draws = [draw("weight", 0, index) for index in range(4000)]
    assert draws == [draw("weight", 0, index) for index in range(4000)]
    assert abs(sum(value < 0.3 for value in draws) / 4000 - 0.3) < 0.03


def results(recipe: TokenizeRecipe) -> list[Any]:
    worker = UnitWorker(recipe)
    units = [unit for source in recipe.sources for unit in grouped(source.name, source.inputs(), recipe.units)]
    return [result for unit in units for result in worker.rows(unit)]


def test_what_filters_drop_is_counted_and_the_rest_is_unchanged(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    everything = {row.row_id: row for row in results(recipe)}
    sounds = "sources.0.filters={min_pixels: 14, max_aspect: 1.8, max_seconds: 0.45}"
    filtered = results(read_recipe(TokenizeRecipe, tmp_path / "recipe.yaml", [sounds, "sources.1.weight=0.5"]))
    rows = {row.row_id: row for row in filtered if isinstance(row, Row)}
    reasons = [item.reason for item in filtered if isinstance(item, Dropped)]
    assert set(reasons) == {"min_pixels", "max_aspect", "max_seconds", "weight"}
    assert len(rows) + len(reasons) == len(everything) == 42
    for row_id, row in rows.items():
        assert (row.sequence.token_ids == everything[row_id].sequence.token_ids).all()


def test_drops_stand_in_the_statistics_by_source_and_reason(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    recipe = read_recipe(TokenizeRecipe, write_recipe(tmp_path), ["sources.1.filters={min_characters: 60}"])
    worker = UnitWorker(recipe)
    (lines,) = [source for source in recipe.sources if source.name == "lines"]
    dropped = documents = 0
    for unit in grouped("lines", lines.inputs(), recipe.units):
        counts = worker.run(unit).statistics["sources"].get("lines", {"documents": 0, "dropped": {}})
        dropped += counts["dropped"].get("min_characters", 0)
        documents += counts["documents"]
    assert dropped > 0
    assert dropped + documents == 30
