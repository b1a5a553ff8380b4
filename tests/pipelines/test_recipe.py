"""Recipes: strict, and every fault at once with place, value and remedy."""

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import RecipeError, Settings, dump_recipe, read_recipe
from pipelines.recurring.recipe import PipelineRecipe
from pipelines.tokenize.recipe import TokenizeRecipe
from slurm.settings import ClusterRecipe

SHIPPED = Path(__file__).parent.parent.parent / "configs"


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
        ("name: !foo 3\n", "r.yaml:1: name = '3': its tag !foo means nothing in a recipe"),
        ("name: a\nshare: 2024-99-99\n", "r.yaml:2: share = '2024-99-99': expected a number, found text"),
        ('name: "\\ud800"\n', "holds half of a surrogate pair"),
        (f"name: a\nshare: {'9' * 5000}\n", "r.yaml:2: share"),
        ("name: a\nmode: !!int pad\n", "r.yaml:2: mode = 'pad': is no int"),
        ("name: a\n? [b]\n: 1\n", "r.yaml:2: the recipe: a key must be text"),
        ("name: a\nsources: [{path: x}]\n", "r.yaml:2: sources.0: 'reader' is missing; it says what this section is"),
        ("name: &a [*a]\n", "nested over 50 levels deep, or in itself"),
    ],
)
def test_odd_yaml_is_a_fault_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1, "one fault is told once"


class Everything(Settings):
    whole: int = 1
    maybe: int | None = None
    number: float = 0.5
    flag: bool = False
    text: str = "a"
    words: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    file: Path | None = None
    mode: Literal["pad", "no"] = "pad"
    section: Folder | None = None


def _everything(tmp_path: Path, text: str, *overrides: str) -> Everything:
    file = tmp_path / "e.yaml"
    file.write_text(text)
    return read_recipe(Everything, file, overrides)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("whole: true", "whole = true: expected a whole number, found true or false"),
        ("whole: '4'", "whole = '4': expected a whole number, found text; write it without quotes"),
        ("whole: 4.5", "whole = 4.5: expected a whole number, found a number"),
        ("whole: 1:30", "whole = '1:30': expected a whole number, found text"),
        ("whole: 010", "whole = '010': expected a whole number, found text"),
        ("whole: null", "whole = null: expected a whole number, found nothing"),
        ("maybe: true", "maybe = true: expected a whole number, found true or false"),
        ("number: 'x'", "number = 'x': expected a number, found text"),
        ("number: '.5'", "number = '.5': expected a number, found text; write it without quotes"),
        ("number: false", "number = false: expected a number, found true or false"),
        ("flag: 1", "flag = 1: expected true or false, found a whole number"),
        ("flag: yes", "flag = 'yes': expected true or false, found text; write true"),
        ("flag: Off", "flag = 'Off': expected true or false, found text; write false"),
        ("text: 5", "text = 5: expected text, found a whole number; put it in quotes"),
        ("text: 1e-3", "text = 0.001: expected text, found a number; put it in quotes"),
        ("text: true", "text = true: expected text, found true or false; put it in quotes"),
        ("text: [a]", "text = ['a']: expected text, found a list"),
        ("words: a", "words = 'a': expected a list, found text"),
        ("words: [a, 2]", "words.1 = 2: expected text, found a whole number; put it in quotes"),
        ("pair: [1, x]", "pair.1 = 'x': expected a whole number, found text"),
        ("file: 3", "file = 3: expected text, found a whole number; put it in quotes"),
        ("section: 3", "section = 3: expected keys with values, found a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_expected(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _everything(tmp_path, f"# a comment\n{line}\n")
    assert str(caught.value).replace(str(tmp_path), "").splitlines()[1:] == [f"  /e.yaml:2: {message}"]
    key, _, value = line.partition(": ")
    with pytest.raises(RecipeError) as caught:
        _everything(tmp_path, "whole: 1\n", f"{key}={value}")
    assert str(caught.value).splitlines()[1:] == [f"  command line: {message}"]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("number: 1e-3", 1e-3),
        ("number: 1E+2", 100.0),
        ("number: 3", 3.0),
        ("number: .inf", float("inf")),
        ("whole: 1e9", 10**9),
        ("whole: 1_000_000", 10**6),
        ("whole: 0x1f", 31),
        ("whole: -0", 0),
        ("maybe: ~", None),
        ("maybe:", None),
        ("text: no", "no"),
        ("text: 2026-11-24", "2026-11-24"),
        ("text: 12:30", "12:30"),
        ("text: 010", "010"),
        ("text: 1.2.3", "1.2.3"),
        ("text: '5'", "5"),
        ("mode: no", "no"),
        ("flag: True", True),
        ("words: [yes, 'null']", ("yes", "null")),
        ("pair: [3, 4]", (3, 4)),
        ("file: a/b", Path("a/b")),
    ],
)
def test_plain_values_are_what_they_look_like(tmp_path: Path, line: str, value: object) -> None:
    key = line.partition(":")[0]
    found = getattr(_everything(tmp_path, line), key)
    assert (type(found), found) == (type(value), value)


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(["yes", "1e-3", "010", "0o7", "~"])
)
@example("\x85")
@example("a\u2028 b")
def test_any_text_is_dumped_so_that_both_versions_of_yaml_read_it(text: str) -> None:
    settings = Everything(text=text, words=(text,), number=float("inf"), maybe=7)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8", newline="") as file:
        file.write(dumped := dump_recipe(settings))
        file.flush()
        assert read_recipe(Everything, file.name) == settings
    assert yaml.safe_load(dumped)["text"] == text


def test_an_override_hides_the_places_of_what_it_replaces(tmp_path: Path) -> None:
    text = "name: a\nsources:\n- reader: folder\n  path: x\n"
    with pytest.raises(RecipeError) as caught:
        _read(tmp_path, text, "sources=[{reader: folder, path: 3}]")
    assert str(caught.value).splitlines()[1].startswith("  command line: sources.0.path = 3: expected text")


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.yaml")), ids=lambda file: file.stem + "-" + file.parent.name)
def test_every_shipped_recipe_is_read_and_reads_back_equal(tmp_path: Path, file: Path) -> None:
    kinds = {
        "tokenize": TokenizeRecipe,
        "pretrain": PretrainRecipe,
        "cluster": ClusterRecipe,
        "pipeline": PipelineRecipe,
    }
    kind = kinds[file.parent.name]
    recipe = read_recipe(kind, file)  # type: ignore[type-var]
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert read_recipe(kind, tmp_path / "dumped.yaml") == recipe  # type: ignore[type-var]


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "name: ä\nsources:\n- {reader: lines, file: y}\n")
    assert _read(tmp_path, dump_recipe(recipe)) == recipe
