"""What a checkpoint is evaluated on: whole documents of one split of a dataset version.

Enters: a dataset, and the vocabulary and context of a checkpoint. Leaves: `Document`s in stored order. Always holds: the
dataset's ids mean what the checkpoint's mean, a dataset that drops duplicates gives each content once, and which documents a
limit leaves follows from the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipelines.evaluate.errors import EvaluateError
from pipelines.interleave import Sequence
from pipelines.loading import Index, LoadingError
from pipelines.loading.packing import permutation
from pipelines.loading.reading import read_block
from pipelines.sequence import Vocabulary, parse
from pipelines.shards.dataset import Dataset

SPLITS = ("validation", "train")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document of the split."""

    number: int
    """Of its row, as `pipelines.rows.rows_at` counts them."""
    sequence: Sequence
    bounds: tuple[int, ...]
    """Where it is cut into pieces of at most the checkpoint's context, 0 and its length included."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of one split, or so many of them."""

    dataset: Dataset
    name: str
    index: Index

    @classmethod
    def open(
        cls,
        uri: str,
        vocabulary: Vocabulary,
        *,
        context: int,
        whose: str,
        version: int | None = None,
        split: str = "validation",
        limit: int | None = None,
        seed: int = 0,
    ) -> Split:
        """Open a dataset for a checkpoint.

        Args:
            vocabulary: the checkpoint's. One of the first audio codebooks makes the dataset a view of them.
            context: the most tokens that the checkpoint takes at once.
            whose: names the checkpoint in errors.
            limit: so many documents, drawn by the seed; None takes all.

        Raises:
            EvaluateError: no such split, nothing in it, or spans that are longer than the context.
            VocabularyError: the dataset's ids mean something else; it lists what differs.
            DatasetError: no dataset there, or no such version.
        """
        if split not in SPLITS:
            raise EvaluateError(f"split is {split!r}: choose {' or '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise EvaluateError(f"limit is {limit}: give at least 1, or leave it out to take every document")
        dataset = Dataset.open(uri, version)
        there = dataset.vocabulary
        codebooks = vocabulary.audio_codebooks
        first = codebooks if 0 < codebooks < there.audio_codebooks else None
        seen = there if first is None else there.first_codebooks(first)
        vocabulary.require_same(seen, this=whose, that=f"dataset {dataset.uri}")
        try:
            index = Index.build(dataset, context, first)
        except LoadingError as error:
            raise EvaluateError(
                f"{whose} takes at most {context:,} tokens at once (max_sequence_length), and no picture or sound may be "
                f"cut: {error}"
            ) from error
        index = index.split(validation=split == "validation")
        if not index.documents:
            share = dataset.validation_share
            other = "train" if split == "validation" else "validation"
            raise EvaluateError(
                f"{dataset.uri} version {dataset.version}: no document in the {split} split (validation_share is {share:g}); "
                f"evaluate on the other one with --split {other}, or tokenize more"
            )
        return cls(dataset=dataset, name=split, index=_limited(index, limit, seed))

    @property
    def documents(self) -> int:
        return self.index.documents

    @property
    def tokens(self) -> int:
        return self.index.tokens

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return self.index.vocabulary

    def __iter__(self) -> Iterator[Document]:
        index = self.index
        first_row = np.concatenate([[0], np.cumsum([block.rows for block in index.blocks], dtype=np.int64)])
        for b in np.unique(index.block).tolist():
            pieces = slice(int(index.block_bounds[b]), int(index.block_bounds[b + 1]))
            read = read_block(index, index.blocks[b])
            rows, starts = index.row[pieces], index.start[pieces]
            for row in np.unique(rows).tolist():
                here = slice(int(read.offsets[row]), int(read.offsets[row + 1]))
                token_ids, modality_ids = read.token_ids[here], read.modality_ids[here]
                spans = parse(self.vocabulary, token_ids, modality_ids)
                yield Document(
                    number=int(first_row[b]) + row,
                    sequence=Sequence(token_ids=token_ids, modality_ids=modality_ids, spans=spans),
                    bounds=(*starts[rows == row].tolist(), len(token_ids)),
                )


def _limited(index: Index, limit: int | None, seed: int) -> Index:
    if limit is None or limit >= index.documents:
        return index
    # The pieces of a document follow one another.
    document = np.cumsum(index.start == 0) - 1
    chosen = permutation(index.documents, seed)[:limit]
    return index.only(np.isin(document, chosen))
