"""`braid show`: one row of a dataset, back to what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.decode import DecodedSpan, decode, write_spans
from pipelines.interleave import deinterleave
from pipelines.rows import StoredRow, find_row
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.tokenize.history import newest_recipe
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


def dataset_tokenizers(dataset: Dataset) -> Tokenizers:
    """The tokenizers that the dataset was made with, by its newest recipe.

    Raises:
        DatasetError: no recipe says which they are.
        VocabularyError: what lies there now is another tokenizer.
    """
    recipe = newest_recipe(dataset.storage)
    tokenizers = Tokenizers.load(recipe)
    dataset.vocabulary.require_same(
        tokenizers.vocabulary(recipe), this=f"dataset {dataset.uri}", that="the tokenizers its recipe names now"
    )
    return tokenizers


def show(
    dataset: Dataset, rows: Iterable[str | StoredRow], out: Path | None = None, tokenizers: Tokenizers | None = None
) -> Iterator[ShownRow]:
    """Decode rows, and write their spans to files below `out` where that is given.

    Args:
        rows: each by its index, its id, a beginning of its id, or as it was read.
    """
    if out and out.exists() and not out.is_dir():
        raise DatasetError(f"{out}: a file; name a folder for what is decoded")
    wanted = [(find_row(dataset, row) if isinstance(row, str) else row).values for row in rows]
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
