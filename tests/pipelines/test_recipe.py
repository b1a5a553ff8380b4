"""Recipes: strict, and every fault at once with place, value and remedy."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipelines.recipe import RecipeError, Settings, dump_recipe, read_recipe


class Folder(Settings):
    reader: Literal["folder"]
    path: str
    limit: int = Field(3, ge=1)


class Lines(Settings):
    reader: Literal["lines"]
    file: str


class Recipe(Settings):
    name: str
    sources: list[Annotated[Folder | Lines, Field(discriminator="reader")]] = Field([])
    share: float = Field(0.1, ge=0, le=1)
    mode: Literal["pad", "crop"] = "pad"


def _read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return read_recipe(Recipe, file, overrides)


def test_every_fault_is_listed_with_its_line(tmp_path: Path) -> None:
    text = "sources:\n- reader: folder\n  paht: x\n  limit: 0\n- reader: liens\nshaer: 1\nmode: pda\n"
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    lines = str(caught.value).replace(str(tmp_path), "").splitlines()
    assert lines[0] == "7 faults in the recipe:"
    assert "  /r.yaml:1: name: missing; it has no default" in lines
    assert "  /r.yaml:2: sources.0.path: missing; it has no default" in lines
    assert "  /r.yaml:3: sources.0.paht: unknown key; did you mean path?" in lines
    assert "  /r.yaml:4: sources.0.limit = 0: Input should be greater than or equal to 1" in lines
    assert any(line.startswith("  /r.yaml:5: sources.1 = ") and line.endswith("did you mean lines?") for line in lines)
    assert "  /r.yaml:6: shaer: unknown key; did you mean share?" in lines
    assert "  /r.yaml:7: mode = 'pda': Input should be 'pad' or 'crop'; did you mean pad?" in lines


def test_a_key_that_stands_twice_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2: name: stands twice"):
        _read(tmp_path, "name: a\nname: b\n")


def test_overrides_win_and_their_faults_name_the_command_line(tmp_path: Path) -> None:
    text = "name: a\nsources:\n- {reader: folder, path: x}\n"
    recipe = _read(tmp_path, text, "share=0.5", "sources.0.limit=9", "name=b=c")
    assert (recipe.share, recipe.sources[0].limit, recipe.name) == (0.5, 9, "b=c")  # type: ignore[union-attr]
    for override, message in {
        "share=2": "command line: share = 2: Input should be less than or equal to 1",
        "nothing": "command line: nothing: an override is written key.subkey=value",
        "share.x=1": "command line: share = {'x': 1}",
        "bar.x=1": "command line: bar: unknown key",
    }.items():
        with pytest.raises(RecipeError) as caught:
            _read(tmp_path, text, override)
        assert message in str(caught.value)


def test_what_is_not_yaml_or_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2: not YAML"):
        _read(tmp_path, "name: a\n b: [\n")
    with pytest.raises(RecipeError, match=r"nor a shipped recipe; shipped are .*tokenize/demo"):
        read_recipe(Recipe, "nowhere")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        _read(tmp_path, "- a\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\x07b\n", "not YAML"),
        ("name: !foo 3\n", "r.yaml:1: name = '3': could not determine a constructor"),
        ("name: a\nshare: 2024-99-99\n", "r.yaml:2: share = '2024-99-99': month must be in 1..12"),
        ("name: &a [*a]\n", "nested over 50 levels deep, or in itself"),
    ],
)
def test_odd_yaml_is_a_fault_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    assert message in str(caught.value)


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "name: ä\nsources:\n- {reader: lines, file: y}\n")
    assert _read(tmp_path, dump_recipe(recipe)) == recipe
