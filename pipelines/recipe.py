"""Recipes: YAML files read into strict, frozen settings.

Enters: a YAML file and overrides `a.b=value`. Leaves: a validated settings object, or a `RecipeError` that lists every
fault at once with file:line, dotted key, value and remedy. Always holds: a key that nobody reads is an error, and no
value is taken for one of another type.

Plain values are read by the core schema of YAML 1.2: `1e-3` is a number, and `yes`, `no`, `on`, `off`, `1:30`, `010` and
dates are text. Two things beyond it: `1_000_000` is a number, and `1e9` a whole one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every fault. The command exits with code 2."""


class Settings(BaseModel):
    """Base of every section of a recipe: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, ser_json_inf_nan="constants")


S = TypeVar("S", bound=BaseModel)

MOST_LEVELS = 50
"""Deeper recipes are refused: an anchor may name what it stands in."""

_TAG = "tag:yaml.org,2002:"

_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""What a plain scalar must look like to be no text, and with which characters it may begin."""

_Keys = tuple[str, ...]
"""Where a value stands: the keys that lead to it."""

_Fault = tuple[_Keys, str]
"""Where a fault lies, and all that is said of it."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}
"""By pydantic's name of the fault."""

_FOUND = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "keys with values",
    type(None): "nothing",
}

SHIPPED = Path(__file__).parent / "configs"
"""Where an installed Braid keeps its recipes; in a checkout they lie in `configs/` at the top."""


def recipe_path(name: str | Path) -> Path:
    """The file a user means: a path, or the name of a shipped recipe such as `tokenize/demo`.

    Raises:
        RecipeError: there is no such file; the message lists the shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED if SHIPPED.is_dir() else Path(__file__).parent.parent / "configs"
    for candidate in (shipped / path, shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
    raise RecipeError(f"{name}: no such recipe file, nor a shipped recipe; shipped are {', '.join(known) or 'none'}")


def read_recipe(kind: type[S], path: str | Path, overrides: Iterable[str] = ()) -> S:
    """Read, override and validate a recipe.

    Args:
        kind: the settings class that the recipe must fill: a `Settings`, or a leaf's model that is as strict.
        path: a file, or the name of a shipped recipe.
        overrides: `a.b=value` each, the value in YAML; they win over the file.

    Raises:
        RecipeError: it lists every fault.
    """
    file = recipe_path(path)
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{file}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values")
    places: dict[_Keys, str] = {}
    faults: list[_Fault] = []
    values = _construct(node, (), lambda at: f"{file}:{at.start_mark.line + 1}", places, faults)
    for override in overrides:
        _override(values, override, places, faults)
    try:
        # As JSON, because only there a strict tuple takes a list, and a strict enum its text.
        settings = kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        known = {keys for keys, _ in faults}
        more = [_fault(kind, file, places, dict(detail)) for detail in error.errors()]
        faults += [fault for fault in more if fault[0] not in known]
        settings = None
    if faults or settings is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{count} in the recipe:\n" + "\n".join(f"  {message}" for _, message in faults))
    return settings


def dump_recipe(settings: BaseModel) -> str:
    """The resolved recipe as YAML: every value written out, readable by `read_recipe` and by any YAML 1.1."""
    values = settings.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """Tells plain scalars apart by `_PLAIN`; values are made by `_scalar`."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML folds these line breaks of YAML 1.1 away in every style but this one.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _represent_text)

_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, ""])


def _construct(
    node: yaml.Node,
    at: _Keys,
    place: Callable[[yaml.Node], str],
    places: dict[_Keys, str],
    faults: list[_Fault],
) -> Any:
    """Build plain values, remembering where each stands; duplicate keys are faults."""
    places[at] = place(node)
    if len(at) > MOST_LEVELS:
        raise RecipeError(f"{places[at]}: {'.'.join(at[:4])} ...: nested over {MOST_LEVELS} levels deep, or in itself")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                faults.append((at, f"{place(key_node)}: {'.'.join(at) or 'the recipe'}: a key must be text"))
                continue
            key = str(key_node.value)
            if key in mapping:
                faults.append(((*at, key), f"{place(key_node)}: {'.'.join((*at, key))}: stands twice; keep one"))
            mapping[key] = _construct(value_node, (*at, key), place, places, faults)
            places[(*at, key)] = place(key_node)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, str(i)), place, places, faults) for i, item in enumerate(node.value)]
    try:
        return _scalar(node.tag.removeprefix(_TAG), node.value)
    except ValueError as error:
        faults.append((at, f"{places[at]}: {'.'.join(at)} = {node.value!r}: {error}; quote it if it is text"))
        return None


def _scalar(kind: str, text: str) -> Any:
    """The value of a scalar; a ValueError if it has none."""
    if kind == "str":
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("holds half of a surrogate pair, which is no text")
        return text
    if kind not in _PLAIN:
        raise ValueError(f"its tag {kind} means nothing in a recipe")
    if not re.fullmatch(_PLAIN[kind][0], text) and not (kind == "float" and re.fullmatch(_PLAIN["int"][0], text)):
        raise ValueError(f"is no {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "").lower()
    if kind == "int":
        return int(digits, 0)
    number = float(digits.replace(".inf", "inf").replace(".nan", "nan"))
    # A budget of 1e9 tokens is a whole number, and settings of floats take whole numbers too.
    return int(number) if "." not in digits and abs(number) <= 2**53 and number.is_integer() else number


def _override(values: dict[str, Any], override: str, places: dict[_Keys, str], faults: list[_Fault]) -> None:
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not equals or not all(keys):
        faults.append((keys, f"command line: {override}: an override is written key.subkey=value"))
        return
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        faults.append((keys, f"command line: {dotted}: value {text!r} is not YAML; quote it"))
        return
    target: Any = values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(target, list) and key.isdigit() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
        else:
            faults.append((keys, f"command line: {dotted}: {'.'.join(keys[: depth + 1])} is not in the recipe"))
            return
    last = keys[-1]
    if not isinstance(target, dict) and not (isinstance(target, list) and last.isdigit() and int(last) < len(target)):
        faults.append((keys, f"command line: {dotted}: {'.'.join(keys[:-1])} holds no keys"))
        return
    for covered in [place for place in places if place[: len(keys)] == keys]:
        del places[covered]
    for depth in range(1, len(keys)):
        places.setdefault(keys[:depth], "command line")
    value = None if node is None else _construct(node, keys, lambda _: "command line", places, faults)
    places[keys] = "command line"
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def _fault(kind: type[BaseModel], file: Path, places: Mapping[_Keys, str], detail: Mapping[str, Any]) -> _Fault:
    """A fault that pydantic found, with its place in the file or on the command line."""
    location = tuple(str(part) for part in detail["loc"])
    # A discriminated union puts its tag into the location; it is no key of the file.
    keys: _Keys = ()
    for part in location:
        if (*keys, part) in places or (detail["type"] in ("missing", "extra_forbidden") and part == location[-1]):
            keys = (*keys, part)
    place = next((places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in places), f"{file}:1")
    dotted = ".".join(keys) or "the recipe"
    if detail["type"] == "extra_forbidden":
        names = _names_at(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(names))}"
        return keys, f"{place}: {dotted}: unknown key; {hint}"
    if detail["type"] == "missing":
        return keys, f"{place}: {dotted}: missing; it has no default"
    if detail["type"] == "union_tag_not_found":
        return keys, f"{place}: {dotted}: {detail['ctx']['discriminator']} is missing; it says what this section is"
    if detail["type"] in _EXPECTED:
        message = _mistaken(detail["type"], detail["input"])
    else:
        message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        choice = _near_choice(detail)
        message += f"; did you mean {choice}?" if choice else ""
    return keys, f"{place}: {dotted} = {_short(detail['input'])}: {message}"


def _mistaken(fault: str, value: Any) -> str:
    """What is said of a value of the wrong type."""
    message = f"expected {_EXPECTED[fault]}, found {_FOUND.get(type(value), type(value).__name__)}"
    if fault == "string_type" and isinstance(value, bool | int | float):
        return f"{message}; put it in quotes"
    if fault == "bool_type" and str(value).lower() in ("yes", "no", "on", "off"):
        return f"{message}; write {'true' if str(value).lower() in ('yes', 'on') else 'false'}"
    if fault in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(_PLAIN["float"][0], value):
        return f"{message}; write it without quotes"
    return message


def _names_at(kind: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    """The keys that the model at a location knows."""
    kinds: list[type[BaseModel]] = [kind]
    for part in location:
        following: list[type[BaseModel]] = []
        for model in kinds:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
        # List indices keep the models; a union's tag narrows them to the model it names.
        kinds = following or [m for m in kinds if _has_tag(m, part)] or kinds
    return [name for model in kinds for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(f.annotation) for f in model.model_fields.values())


def _near_choice(detail: Mapping[str, Any]) -> str | None:
    context = detail.get("ctx", {})
    choices = str(context.get("expected") or context.get("expected_tags") or "").replace("'", "")
    given = str(context.get("tag", detail["input"]))
    options = [c.strip() for c in choices.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(given, options, n=1)
    return near[0] if near else None


def _short(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
