"""Every kind of bad or odd input, the whole way: real readers, a real worker, a real commit.

Each kind is a source of one recipe. What cannot be read is in the quarantine with the reason that is true of it, and what
stands beside it is in the dataset; what can be read is there as what it is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.interleave import deinterleave
from pipelines.recipe import read_recipe
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.verify import verify
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines.bad_media import MEDIA, Files, Kind
from tests.pipelines.bad_records import RECORDS
from tests.pipelines.jobs import run_units
from tests.pipelines.reading import write
from tests.pipelines.tiny import write_recipe
from tests.test_docs import reasons

# Pytest sets the warning filters anew, which Braid sets for its process.
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = MEDIA | RECORDS

ELSEWHERE = {
    "audio: no tokenizer": "another recipe",
    "image: no tokenizer": "another recipe",
    "document: too large": "1 GiB",
}
"""Reasons that are shown in test_preprocessing.py and test_tokenize.py, and why not here."""


@dataclass
class Found:
    """What a source has in the dataset."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    """Token ids."""
    texts: list[str] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)


def source_of(name: str, folder: Path, kind: Kind, recipe: TokenizeRecipe) -> dict[str, Any]:
    settings = dict(kind.settings) | {"name": name, "path": str(folder)}
    if "media" in settings:
        settings["media"] = str(folder / settings["media"])
    if "made_with" in settings:
        vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
        settings["made_with"] = {key: getattr(vocabulary, key) for key in settings["made_with"]}
    return settings


def put(folder: Path, files: Files, kind: Kind | None = None) -> Path:
    folder.mkdir(parents=True)
    write(folder, dict(files))
    if kind:
        kind.make(folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """All kinds, each with its plain counterpart, as one job."""
    folder = tmp_path_factory.mktemp("bad")
    limits = ["error_budget=1", "tokenizers.text.max_characters=20000", "tokenizers.audio.max_seconds=60"]
    recipe = read_recipe(TokenizeRecipe, write_recipe(folder), [*limits, "units.bytes=1000000", "units.inputs=100"])
    sources = []
    for name, kind in KINDS.items():
        sources.append(source_of(name, put(folder / "raw" / name, kind.files, kind), kind, recipe))
        if kind.like:
            plain = put(folder / "plain" / name, kind.like)
            sources.append({"name": f"{name}.plain", "reader": "media_folder", "path": str(plain)})
    recipe = TokenizeRecipe.model_validate(recipe.model_dump() | {"sources": sources})
    dataset = run_units(recipe)
    assert list(verify(dataset)) == []
    return results(dataset, Tokenizers.load(recipe))


def results(dataset: Dataset, tokenizers: Tokenizers) -> dict[str, Found]:
    found: dict[str, Found] = defaultdict(Found)
    for batch in dataset.read():
        for row in batch.to_pylist():
            source = found[row["source"].partition("/")[0]]
            source.rows.append(tuple(row["token_ids"]))
            spans = deinterleave(dataset.vocabulary, *(_array(row, name) for name in ("token_ids", "modality_ids")))
            source.texts += [tokenizers.text.decode(s.codes) for s in spans if s.modality is Modality.TEXT]
    for reject in dataset.quarantined():
        found[reject["source"].partition("/")[0]].rejects.append(reject)
    return found


def _array(row: dict[str, Any], name: str) -> Any:
    return np.array(row[name], np.int32 if name == "token_ids" else np.int8)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.reason])
def test_what_cannot_be_read_is_quarantined_for_its_true_reason_and_the_rest_is_read(
    name: str, found: dict[str, Found]
) -> None:
    kind, there = KINDS[name], found[name]
    assert len(there.rejects) == 1, there.rejects
    (reject,) = there.rejects
    assert reject["reason"] == kind.reason, reject["error"]
    assert kind.says in reject["error"]
    assert re.search(r"[.:;] ?\S", reject["error"]), "a place, and what is wrong there"
    assert sorted(there.texts) == sorted(kind.texts)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.reason])
def test_what_is_merely_odd_is_read_as_what_it_is(name: str, found: dict[str, Found]) -> None:
    kind, there = KINDS[name], found[name]
    assert there.rejects == []
    if kind.like:
        assert Counter(there.rows) == Counter(found[f"{name}.plain"].rows)
        assert len(there.rows) == len(kind.like)
    else:
        assert sorted(there.texts) == sorted(kind.texts)


def test_codes_tell_pictures_and_sounds_apart(found: dict[str, Found]) -> None:
    """So that equal rows mean that the same was read."""
    for kinds in ("picture", "sound"):
        rows = [row for name in KINDS if name.startswith(kinds) for row in set(found[f"{name}.plain"].rows)]
        files = {
            b for n, k in KINDS.items() if n.startswith(kinds) and k.like for f, b in k.like.items() if f[0] == "x"
        }
        # One more, which is the text beside each.
        assert len(set(rows)) > len(files) / 2


def test_every_reason_is_shown() -> None:
    assert {kind.reason for kind in KINDS.values() if kind.reason} == reasons() - ELSEWHERE.keys()
    assert len(KINDS) > 100
