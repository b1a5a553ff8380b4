"""What earlier runs on a dataset were told: each run leaves its resolved recipe in the dataset.

Enters: recipes. Leaves: each source's last settings. Always holds: `sources.json` is derived from the recipes, and says which
of them it has taken in, so however it was lost or left behind by two jobs at once, only recipes that it lacks are read.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

import yaml

from pipelines.recipe import dump_recipe
from pipelines.shards.migrate import DatasetError
from pipelines.shards.storage import Storage
from pipelines.tokenize.recipe import TokenizeRecipe

_SOURCES = "sources.json"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where it is there: about ten times faster."""


def record_recipe(dataset: Storage, recipe: TokenizeRecipe) -> str:
    """Leave the recipe of a run that has work to do; the file's name in the dataset."""
    name = f"recipes/{datetime.now(UTC).strftime('%Y%m%dT%H%M%S.%f')}-{uuid.uuid4().hex[:6]}.yaml"
    dataset.write(name, dump_recipe(recipe.anchored()).encode())
    dataset.write(_SOURCES, json.dumps(_sources(dataset)).encode())
    return name


def newest_recipe(dataset: Storage) -> TokenizeRecipe:
    """The recipe of the newest run, which names the dataset's tokenizers.

    Raises:
        DatasetError: there is none.
    """
    names = dataset.names("recipes")
    if not names:
        raise DatasetError(f"{dataset.uri}/recipes is empty, so its tokenizers are unknown; restore the recipe there")
    return TokenizeRecipe.model_validate(yaml.load(dataset.read(f"recipes/{names[-1]}"), _LOADER))


def last_settings(dataset: Storage) -> dict[str, dict[str, Any]]:
    """Each source's settings in the newest recipe that named it."""
    return {name: source["settings"] for name, source in _sources(dataset)["sources"].items()}


def _sources(dataset: Storage) -> dict[str, Any]:
    """`{"recipes": names that were taken in, "sources": {name: {"recipe": the newest, "settings": its section}}}`."""
    known: dict[str, Any] = {"recipes": [], "sources": {}}
    if dataset.exists(_SOURCES):
        known = json.loads(dataset.read(_SOURCES))
    names = dataset.names("recipes")
    sources = known["sources"]
    for name in sorted(set(names) - set(known["recipes"])):
        for settings in yaml.load(dataset.read(f"recipes/{name}"), _LOADER)["sources"]:
            # Names begin with the time. A recipe of another job may have been taken in before this older one.
            if name >= sources.get(settings["name"], {"recipe": ""})["recipe"]:
                sources[settings["name"]] = {"recipe": name, "settings": settings}
    return {"recipes": names, "sources": sources}
