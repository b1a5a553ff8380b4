"""Recipes: YAML files read into strict, frozen settings.

Enters: a YAML file and overrides `a.b=value`. Leaves: a validated settings object, or a `RecipeError` that lists every
fault at once with file:line, dotted key, value and remedy. Always holds: a key that nobody reads is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class RecipeError(ValueError):
    """A recipe cannot be used; the message lists every fault. The command exits with code 2."""


class Settings(BaseModel):
    """Base of every section of a recipe: unknown keys are refused, values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


S = TypeVar("S", bound=Settings)

MOST_LEVELS = 50
"""Deeper recipes are refused: an anchor may name what it stands in."""

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
        kind: the settings class that the recipe must fill.
        path: a file, or the name of a shipped recipe.
        overrides: `a.b=value` each, the value in YAML; they win over the file.

    Raises:
        RecipeError: it lists every fault.
    """
    file = recipe_path(path)
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{file}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}:1: a recipe is a mapping of keys to values")
    places: dict[tuple[str, ...], str] = {}
    faults: list[str] = []
    values = _construct(node, (), file, places, faults)
    for override in overrides:
        _override(values, override, places, faults)
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        faults += [_fault(kind, file, places, dict(detail)) for detail in error.errors()]
        settings = None
    if faults or settings is None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{count} in the recipe:\n" + "\n".join(f"  {fault}" for fault in faults))
    return settings


def dump_recipe(settings: Settings) -> str:
    """The resolved recipe as YAML: every value written out, readable by `read_recipe`."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _construct(
    node: yaml.Node, at: tuple[str, ...], file: Path, places: dict[tuple[str, ...], str], faults: list[str]
) -> Any:
    """Build plain values, remembering where each stands; duplicate keys are faults."""
    places[at] = f"{file}:{node.start_mark.line + 1}"
    if len(at) > MOST_LEVELS:
        raise RecipeError(f"{places[at]}: {'.'.join(at[:4])} ...: nested over {MOST_LEVELS} levels deep, or in itself")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            where = f"{file}:{key_node.start_mark.line + 1}"
            if key in mapping:
                faults.append(f"{where}: {'.'.join((*at, key))}: stands twice; keep one")
            mapping[key] = _construct(value_node, (*at, key), file, places, faults)
            places[(*at, key)] = where
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*at, str(i)), file, places, faults) for i, item in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError) as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        faults.append(f"{places[at]}: {'.'.join(at)} = {node.value!r}: {problem}; quote it if it is text")
        return None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _override(values: dict[str, Any], override: str, places: dict[tuple[str, ...], str], faults: list[str]) -> None:
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not equals or not all(keys):
        faults.append(f"command line: {override}: an override is written key.subkey=value")
        return
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        faults.append(f"command line: {dotted}: value {text!r} is not YAML; quote it")
        return
    target: Any = values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(target, list) and key.isdigit() and int(key) < len(target):
            target = target[int(key)]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
        else:
            faults.append(f"command line: {dotted}: {'.'.join(keys[: depth + 1])} is not in the recipe")
            return
    last = keys[-1]
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        faults.append(f"command line: {dotted}: {'.'.join(keys[:-1])} holds no keys")
        return
    for depth in range(1, len(keys) + 1):
        if depth == len(keys) or keys[:depth] not in places:
            places[keys[:depth]] = "command line"


def _fault(kind: type[BaseModel], file: Path, places: Mapping[tuple[str, ...], str], detail: Mapping[str, Any]) -> str:
    location = tuple(str(part) for part in detail["loc"])
    # A discriminated union puts its tag into the location; it is no key of the file.
    keys: tuple[str, ...] = ()
    for part in location:
        if (*keys, part) in places or (detail["type"] in ("missing", "extra_forbidden") and part == location[-1]):
            keys = (*keys, part)
    place = next((places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in places), f"{file}:1")
    dotted = ".".join(keys) or "the recipe"
    if detail["type"] == "extra_forbidden":
        names = _names_at(kind, location[:-1])
        near = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(names))}"
        return f"{place}: {dotted}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{place}: {dotted}: missing; it has no default"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("literal_error", "union_tag_invalid"):
        choice = _near_choice(detail)
        message += f"; did you mean {choice}?" if choice else ""
    return f"{place}: {dotted} = {_short(detail['input'])}: {message}"


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
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
