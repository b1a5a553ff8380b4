"""`braid show`: one row of a dataset, back to what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml

from pipelines.decode import DecodedSpan, decode, write_spans
from pipelines.interleave import deinterleave
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.reader import open_shard
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """A row and its decoded spans."""

    row_id: str
    source: str
    num_tokens: int
    spans: list[DecodedSpan]
    files: list[Path | None]
    """Where each span was written."""


def find_row(dataset: Dataset, row: str) -> dict[str, Any]:
    """A row by its index (0 .. documents - 1, in the order of the shards' names) or by its id or a beginning of it.

    Raises:
        DatasetError: no such row, or several that begin so.
    """
    return _row_at(dataset, int(row)) if row.isdecimal() and len(row) < 12 else _row_named(dataset, row)


def dataset_tokenizers(dataset: Dataset) -> Tokenizers:
    """The tokenizers that the dataset was made with, by its newest recipe.

    Raises:
        DatasetError: no recipe says which they are.
        VocabularyError: what lies there now is another tokenizer.
    """
    recipes = dataset.storage.names("recipes")
    if not recipes:
        raise DatasetError(f"{dataset.uri}/recipes is empty, so its tokenizers are unknown; restore the recipe there")
    newest = recipes[-1]
    recipe = TokenizeRecipe.model_validate(yaml.safe_load(dataset.storage.read(f"recipes/{newest}")))
    tokenizers = Tokenizers.load(recipe)
    dataset.vocabulary.require_same(
        tokenizers.vocabulary(recipe), this=f"dataset {dataset.uri}", that="the tokenizers its recipe names now"
    )
    return tokenizers


def show(
    dataset: Dataset, rows: Iterable[str], out: Path | None = None, tokenizers: Tokenizers | None = None
) -> Iterator[ShownRow]:
    """Decode rows, and write their spans to files below `out` where that is given."""
    if out and out.exists() and not out.is_dir():
        raise DatasetError(f"{out}: a file; name a folder for what is decoded")
    wanted = [find_row(dataset, row) for row in rows]
    decoders = tokenizers or dataset_tokenizers(dataset)
    for row in wanted:
        encoded = deinterleave(
            dataset.vocabulary, np.array(row["token_ids"], np.int32), np.array(row["modality_ids"], np.int8)
        )
        spans = decode(encoded, decoders)
        files = write_spans(spans, out, row["row_id"][:12]) if out else [None] * len(spans)
        yield ShownRow(
            row_id=row["row_id"], source=row["source"], num_tokens=row["num_tokens"], spans=spans, files=[*files]
        )


def _row_at(dataset: Dataset, index: int) -> dict[str, Any]:
    before = 0
    for shard in dataset.shards():
        if index < before + shard.rows:
            return _read(dataset, shard.name, index - before)
        before += shard.rows
    there = f"has rows 0 to {before - 1}" if before else "has no rows"
    raise DatasetError(f"{dataset.uri}: no row {index}; version {dataset.version} {there}")


def _row_named(dataset: Dataset, prefix: str) -> dict[str, Any]:
    found: list[tuple[str, int]] = []
    for shard in dataset.shards():
        with open_shard(dataset.storage, shard.name) as file:
            ids = file.read(columns=["row_id"])["row_id"].combine_chunks()
        found += [(shard.name, int(i)) for i in np.flatnonzero(pc.starts_with(ids, prefix).to_numpy(False))]
    if not found:
        raise DatasetError(f"{dataset.uri}: no row id begins with {prefix}; `braid show DATASET 0` shows the first row")
    if len(found) > 1:
        raise DatasetError(f"{dataset.uri}: {len(found)} row ids begin with {prefix}; give more of the id")
    return _read(dataset, *found[0])


def _read(dataset: Dataset, name: str, index: int) -> dict[str, Any]:
    """One row of a shard, reading its row group alone."""
    with open_shard(dataset.storage, name) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if index < rows:
                row: dict[str, Any] = file.read_row_group(group).slice(index, 1).to_pylist()[0]
                return row
            index -= rows
    raise AssertionError(f"{name}: fewer rows than its commit said")
