"""Figures of a text tokenizer on texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.tokenizers.sentencepiece import TextTokenizer


def evaluate(tokenizer: TextTokenizer, texts: Sequence[str]) -> dict[str, Any]:
    """Encode, decode and count.

    Args:
        texts: At least one, not all empty.

    Returns:
        JSON values: bytes of UTF-8 a piece (more is shorter), pieces a word, the shares of pieces that are unknown and that
        are single bytes, the share of texts that come back as they were, and how many different pieces were used.
    """
    processor = tokenizer.processor
    encoded = tokenizer.encode(texts)
    counts = np.bincount(np.concatenate(encoded), minlength=tokenizer.pieces)
    pieces = max(int(counts.sum()), 1)
    of_kind = {
        kind: sum(int(counts[i]) for i in np.flatnonzero(counts).tolist() if test(i))
        for kind, test in (("unknown", processor.is_unknown), ("byte", processor.is_byte))
    }
    came_back = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
    size = sum(len(text.encode()) for text in texts)
    return {
        "texts": len(texts),
        "bytes": size,
        "pieces": int(counts.sum()),
        "bytes_per_piece": round(size / pieces, 3),
        "pieces_per_word": round(pieces / max(sum(len(text.split()) for text in texts), 1), 3),
        "unknown": round(of_kind["unknown"] / pieces, 5),
        "byte_pieces": round(of_kind["byte"] / pieces, 5),
        "round_trip": round(came_back / len(texts), 5),
        "pieces_used": int((counts > 0).sum()),
    }
