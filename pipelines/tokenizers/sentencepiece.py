"""Text to the pieces of a SentencePiece model, and back.

Enters: any text. Leaves: int32 piece ids in [0, pieces), equal to what the sentencepiece library gives for the
whole text. Always holds: text that looks like a control token (`</s>`) or like one of Braid's (`<|end|>`) stays plain text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from pipelines.sequence import Ids, VocabularyError
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.fast_text import FastText, why_not

Engine = Literal["auto", "gigatoken", "sentencepiece"]

PACKAGED = {"mistral-v1": ("mistral_common", "data/tokenizer.model.v1", "mistral-common")}
"""Models that packages ship, by name: import name, file, what to install. `mistral-v1` has 32,000 pieces."""

_SPACE = "\u2581"
"""How a SentencePiece model writes a space."""

_CHUNK = 1000
"""Characters. The library merges pairs of a whole text in one queue: 0.9 M characters at a time took 2.3 times as long
as chunks of 300 to 10,000, and 10 M took 570 MB."""

_BORDER = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTokenizer:
    """A SentencePiece model."""

    name: str
    sha256: str
    """Of the model file: it enters the vocabulary's fingerprint."""
    divisible: bool
    """Whether a text may be cut at single spaces between words without changing its ids."""
    processor: sentencepiece.SentencePieceProcessor
    model: bytes
    """The model file."""
    fast: FastText | None
    """What encodes instead of the library, with the same ids."""

    @classmethod
    def load(cls, name_or_path: str | Path, engine: Engine = "auto") -> TextTokenizer:
        """Load a model.

        Args:
            name_or_path: a `.model` file, or a name of `PACKAGED`.
            engine: who encodes; "auto" takes gigatoken where its ids are the library's own.

        Raises:
            CheckpointError: no such file, no SentencePiece model, a package that is not installed, or a model that the
                engine cannot encode.
        """
        path = packaged(str(name_or_path)) if str(name_or_path) in PACKAGED else Path(name_or_path).expanduser()
        if not path.is_file():
            raise CheckpointError(
                f"no text tokenizer {str(name_or_path)!r}: neither a file nor a packaged name ({', '.join(PACKAGED)})"
            )
        name = str(name_or_path) if str(name_or_path) in PACKAGED else path.stem
        return cls.from_bytes(path.read_bytes(), name, engine, where=str(path))

    @classmethod
    def from_bytes(cls, model: bytes, name: str, engine: Engine = "auto", where: str = "model") -> TextTokenizer:
        """Make a tokenizer of the bytes of a model file; see `load`."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: not a SentencePiece model: {error}; give the `.model` file") from error
        reason = "the recipe names the library" if engine == "sentencepiece" else why_not(processor, model)
        if engine == "gigatoken" and reason:
            raise CheckpointError(f"{where}: gigatoken cannot encode with this model: {reason}; set engine to auto")
        return cls(
            name=name,
            sha256=hashlib.sha256(model).hexdigest(),
            divisible=_is_divisible(processor),
            processor=processor,
            model=model,
            fast=None if reason else FastText(model, processor),
        )

    @property
    def engine(self) -> str:
        """Who encodes."""
        return "gigatoken" if self.fast else "sentencepiece"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.model, self.name, "auto" if self.fast else "sentencepiece")

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return int(self.processor.vocab_size())

    def encode(self, texts: Iterable[str]) -> list[Ids]:
        """Encode texts, each on its own, without control tokens around it.

        Returns:
            int32 [pieces] for each text; empty for an empty text.
        """
        if self.fast:
            return [self.fast.encode(text) for text in texts]
        # One at a time: the library's own batches start threads and were 15% slower on one core.
        encode = self.processor.encode
        return [
            np.array(encode(text), dtype=np.int32)
            if len(text) <= 2 * _CHUNK or not self.divisible
            else np.concatenate([np.array(encode(chunk), dtype=np.int32) for chunk in _chunks(text)])
            for text in texts
        ]

    def decode(self, ids: Ids | Sequence[int]) -> str:
        """The text of piece ids; control pieces give none.

        Raises:
            VocabularyError: an id lies outside the pieces.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if outside := ids[(ids < 0) | (ids >= self.pieces)].tolist():
            raise VocabularyError(f"text id {outside[0]} lies outside the {self.pieces} pieces of {self.name}")
        return str(self.processor.decode(ids.tolist()))


def packaged(name: str) -> Path:
    package, file, distribution = PACKAGED[name]
    # Found without being imported: the package brings a whole chat protocol with it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"text tokenizer {name!r} comes with the package {distribution}, which is not installed; "
            f"run: pip install --no-deps {distribution}"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise CheckpointError(f"{path}: the installed {distribution} lacks this file; reinstall {distribution}")
    return path


def _is_divisible(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model splits a text at single spaces between words as if each side stood alone.

    It does if it puts the space in front of words, if no piece reaches over a space, and if it merges by rank. A
    unigram model, whose scores are no whole numbers, adds them up over a whole text, and rounding may decide between
    equals.
    """
    ordinary = [
        (processor.id_to_piece(i), processor.get_score(i))
        for i in range(processor.vocab_size())
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    return (
        not processor.is_unknown(processor.piece_to_id(_SPACE))
        and "".join(processor.encode("a b", out_type=str)) == f"{_SPACE}a{_SPACE}b"
        and all(_SPACE not in piece.lstrip(_SPACE) and " " not in piece for piece, _ in ordinary)
        and all(score == int(score) for _, score in ordinary)
    )


def _chunks(text: str) -> Iterator[str]:
    """Pieces of a text of at least `_CHUNK` characters; the single spaces between them are what the model adds anew."""
    start = 0
    while len(text) - start > _CHUNK and (border := _BORDER.search(text, start + _CHUNK)):
        yield text[start : border.start()]
        start = border.end()
    yield text[start:]
