"""A faster way to the ids of a SentencePiece model: the package gigatoken, where its ids are the library's own.

Enters: a model's bytes, then texts. Leaves: int32 ids. Always holds: what it encodes has the ids that the sentencepiece
library gives. The two agree on byte-fallback BPE models that do not normalize (docs/decisions/0009-text-engine.md), so
other models are refused here, texts that hold a control or user-defined piece go to the library, and of the texts a
sample is encoded by both.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import sentencepiece

from pipelines.sequence import Ids
from pipelines.tokenizers.checkpoint import CheckpointError

CHECK_EVERY = 1024
"""Of so many texts one is encoded by the library too: at a tenth of the speed, it costs about 1%."""

CHECK_CHARACTERS = 10_000
"""Longer texts are not drawn for the check."""

_PROBES = (
    "naïve Ελλάδα 数据 🙂 \x00 \u2581x",
    "a\n\n b",
    "  two  spaces ",
    "\tx\u00a0\u3000\u200by",
    "\uff21\ufb01\u2460 e\u0301",
    "\u0627\u0644\u0639 \u0e01\u0e33",
)
"""Texts that both must agree on before gigatoken is taken: what normalizers change, bytes, runs of spaces."""


class FastText:
    """A SentencePiece model in gigatoken."""

    def __init__(self, data: bytes, processor: sentencepiece.SentencePieceProcessor) -> None:
        import gigatoken

        self._processor = processor
        self._tokenizer = gigatoken.Tokenizer.from_sentencepiece(data)
        special = [p.piece for p in _parsed(data).pieces if p.type in (p.UNKNOWN, p.CONTROL, p.USER_DEFINED)]
        self._special = re.compile("|".join(re.escape(piece) for piece in special))
        self._count = 0

    def encode(self, text: str) -> Ids:
        """The ids of one text.

        Raises:
            CheckpointError: the library has other ids for a text that was drawn for the check.
        """
        if self._special.search(text):
            return np.array(self._processor.encode(text), dtype=np.int32)
        ids = self._tokenizer.encode(text).view(np.int32)
        self._count += 1
        if self._count % CHECK_EVERY == 1 and len(text) <= CHECK_CHARACTERS:
            theirs = self._processor.encode(text)
            if ids.tolist() != theirs:
                raise CheckpointError(
                    f"gigatoken gives {ids[:20].tolist()} ... for the text {text[:80]!r}, the sentencepiece library "
                    f"{theirs[:20]} ...; set tokenizers.text.engine to sentencepiece, and report the text"
                )
        return ids


def why_not(processor: sentencepiece.SentencePieceProcessor, data: bytes) -> str | None:
    """Why gigatoken cannot stand in for the library with this model; None where it can."""
    if importlib.util.find_spec("gigatoken") is None:
        return "the package gigatoken is not installed"
    if _parsed(data).normalizer_spec.precompiled_charsmap:
        return "the model normalizes its text"
    try:
        fast = FastText(data, processor)
    except ValueError as error:
        return str(error)
    for text in _PROBES:
        if fast.encode(text).tolist() != processor.encode(text):
            return f"its ids of {text!r} differ from the library's"
    return None


def _parsed(data: bytes) -> Any:
    """The model file as its protocol buffer."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    return model
