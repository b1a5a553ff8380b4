"""Which text pieces a dataset uses, by name where the text tokenizer can still be opened.

Enters: a dataset and how often each piece occurs. Leaves: figures. Always holds: a piece has its name from the very model the
dataset was made with, by checksum; otherwise pieces go by their ids, and it is said why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.tokenize.history import newest_recipe
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.sentencepiece import TextTokenizer

TOP = 48
"""Pieces that are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The text tokenizer, or why it is not there."""

    tokenizer: TextTokenizer | None
    missing: str = ""


def names(dataset: Dataset) -> Names:
    """Open the text tokenizer that the dataset's newest recipe names."""
    try:
        recipe = newest_recipe(dataset.storage)
        # The library alone, because nothing is encoded.
        tokenizer = TextTokenizer.load(recipe.tokenizers.text.model, "sentencepiece")
    except (DatasetError, CheckpointError) as error:
        return Names(tokenizer=None, missing=str(error))
    if tokenizer.sha256 != dataset.vocabulary.text_sha256:
        return Names(tokenizer=None, missing=f"{recipe.tokenizers.text.model} is another model than the dataset's")
    return Names(tokenizer=tokenizer)


def _foreign(tokenizer: TextTokenizer) -> list[int]:
    """The pieces that are one byte of a character which the model does not have; line ends are bytes, but no such."""
    processor = tokenizer.processor
    return [
        i for i in range(tokenizer.pieces) if processor.is_byte(i) and int(processor.id_to_piece(i)[1:-1], 16) > 127
    ]


def piece_figures(counts: NDArray[np.int64], known: Names) -> dict[str, Any]:
    """Coverage and the most frequent pieces.

    Args:
        counts: [text pieces], without special tokens.
    """
    order = np.argsort(-counts, kind="stable")
    total = int(counts.sum())
    reached = np.cumsum(counts[order]) / max(total, 1)
    tokenizer = known.tokenizer
    bytes_share = None
    if tokenizer:
        bytes_share = round(sum(int(counts[i]) for i in _foreign(tokenizer)) / max(total, 1), 6)
    return {
        "size": len(counts),
        "used": int(np.count_nonzero(counts)),
        "tokens": total,
        "covering": {f"{q:g}": int(np.searchsorted(reached, q) + 1) if total else 0 for q in (0.5, 0.9, 0.99)},
        "byte_share": bytes_share,
        "missing_names": known.missing or None,
        "top": [
            {
                "id": int(i),
                "piece": tokenizer.processor.id_to_piece(int(i)) if tokenizer else None,
                "count": int(counts[i]),
            }
            for i in order[:TOP]
            if counts[i]
        ],
    }
