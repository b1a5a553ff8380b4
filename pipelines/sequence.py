"""The contract of a sequence: modalities, vocabulary, special tokens, grammar.

A document is `<|document|>`, its spans in order, `<|end|>`. An image span opens with `<|image|> <|rows|> <|columns|>`
and holds rows x columns codes in raster order; an audio span opens with `<|audio|> <|high|> <|low|>`, where
frames = 64 * (high - 1) + low, and holds frames x K codes, frame by frame. All special tokens are text tokens, and the
length of a media span is known the moment it opens, so at every position it is known which head speaks.

Enters: sizes and checksums of the tokenizers. Leaves: a `Vocabulary`, and the one grammar that interleave, verify,
generate and evaluate use. Always holds: every id lies in its modality's range, and `parse` accepts exactly what
`pipelines.interleave.interleave` makes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTRACT_VERSION = 1
"""Raised when the meaning of a stored sequence changes."""

MAX_NUMBER = 64
"""The number tokens are `<|1|>` .. `<|64|>`."""

MAX_FRAMES = MAX_NUMBER * MAX_NUMBER

Ids = NDArray[np.int32]
ModalityIds = NDArray[np.int8]


class Modality(IntEnum):
    """Which vocabulary a token id belongs to; stored as int8."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2

    @property
    def label(self) -> str:
        """The name users read and write: text, image, audio."""
        return _LABELS[self]


_LABELS = ("text", "image", "audio")


class SequenceError(ValueError):
    """A sequence, or something to be made one, breaks the contract. The message names the place and the value."""


class VocabularyError(ValueError):
    """Two things that must share a vocabulary do not, or an id lies outside its vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where one piece of a document lies in its token sequence."""

    modality: Modality
    start: int
    """Index of the first code (or text piece) in the document, after the opening special tokens."""
    length: int
    """Number of codes or text pieces."""
    rows: int = 0
    """Image: rows of codes. Audio: frames. Text: 0."""
    columns: int = 0
    """Image: columns of codes. Audio: codebooks. Text: 0."""
    uri: str = ""
    """The file the span was made from, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the ids of a dataset mean. Two vocabularies agree if and only if their fingerprints do.

    A size of 0 means that the modality does not occur.
    """

    text_pieces: int
    """Number of SentencePiece pieces; Braid's special tokens follow them."""
    text_sha256: str
    image_codebook_size: int = 0
    image_sha256: str = ""
    audio_codebook_size: int = 0
    audio_codebooks: int = 0
    """K: code c of codebook q has the id c + q * audio_codebook_size."""
    audio_sha256: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """How raw media became the tokenizers' input, with the version of that code."""
    contract_version: int = CONTRACT_VERSION

    @property
    def text_vocab_size(self) -> int:
        return self.text_pieces + 4 + MAX_NUMBER

    @property
    def image_vocab_size(self) -> int:
        return self.image_codebook_size

    @property
    def audio_vocab_size(self) -> int:
        return self.audio_codebook_size * self.audio_codebooks

    def size(self, modality: Modality) -> int:
        """Number of ids of a modality's vocabulary."""
        return (self.text_vocab_size, self.image_vocab_size, self.audio_vocab_size)[modality]

    @property
    def document(self) -> int:
        return self.text_pieces

    @property
    def end(self) -> int:
        return self.text_pieces + 1

    @property
    def image(self) -> int:
        return self.text_pieces + 2

    @property
    def audio(self) -> int:
        return self.text_pieces + 3

    def number(self, n: int) -> int:
        """Id of the token `<|n|>`, 1 <= n <= 64."""
        if not 1 <= n <= MAX_NUMBER:
            raise SequenceError(f"number token <|{n}|> does not exist: a span states 1 to {MAX_NUMBER}")
        return self.text_pieces + 3 + n

    def special_name(self, token_id: int) -> str:
        """How a special token is written, such as `<|image|>`; only for ids at or above `text_pieces`."""
        offset = token_id - self.text_pieces
        return f"<|{('document', 'end', 'image', 'audio')[offset] if offset < 4 else offset - 3}|>"

    def image_opening(self, rows: int, columns: int) -> tuple[int, int, int]:
        """The three tokens that open an image span of rows x columns codes, each 1 to 64."""
        if not self.image_codebook_size:
            raise SequenceError("this vocabulary has no image tokenizer; name one in the recipe under tokenizers.image")
        return self.image, self.number(rows), self.number(columns)

    def audio_opening(self, frames: int) -> tuple[int, int, int]:
        """The three tokens that open an audio span of 1 to 4,096 frames."""
        if not self.audio_codebook_size:
            raise SequenceError("this vocabulary has no audio tokenizer; name one in the recipe under tokenizers.audio")
        if not 1 <= frames <= MAX_FRAMES:
            raise SequenceError(f"an audio span of {frames} frames cannot be stated: 1 to {MAX_FRAMES}; split it")
        high, low = divmod(frames - 1, MAX_NUMBER)
        return self.audio, self.number(high + 1), self.number(low + 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"preprocessing": dict(self.preprocessing)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise VocabularyError(f"vocabulary written by a newer Braid: it has {', '.join(unknown)}; update Braid")
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over everything above."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def differences(self, other: Vocabulary) -> list[str]:
        """What differs, one line each: `name: this value, other value`. Empty if the two agree."""
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return [
            f"{name}: {mine.get(name, 'absent')}, {theirs.get(name, 'absent')}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def require_same(self, other: Vocabulary, *, this: str, that: str) -> None:
        """Refuse to go on if the vocabularies differ; `this` and `that` say whose they are.

        Raises:
            VocabularyError: it lists every difference.
        """
        if lines := self.differences(other):
            listing = "\n".join(f"  {line}" for line in lines)
            raise VocabularyError(
                f"{this} and {that} have different vocabularies ({this}, then {that}):\n{listing}\n"
                "Use the same tokenizers and preprocessing for both, or write to a new dataset."
            )

    def first_codebooks(self, count: int) -> Vocabulary:
        """The derived vocabulary that keeps the first `count` audio codebooks."""
        if not 1 <= count <= self.audio_codebooks:
            raise VocabularyError(f"cannot keep {count} audio codebooks of {self.audio_codebooks}")
        return replace(self, audio_codebooks=count)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may stand at one position: a modality and half-open id ranges of its vocabulary."""

    modality: Modality
    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, token_id: int) -> bool:
        return any(low <= token_id < high for low, high in self.ranges)


class Grammar:
    """The grammar of a document, one token at a time: what generation walks and what `parse` walks in strides.

    `allowed` says what may come next, `advance` takes it. After `<|end|>` nothing may: `allowed` is None.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.spans: list[Span] = []
        self.length = 0
        """Tokens taken so far."""
        self.remaining = 0
        """Codes still to come in the open media span."""
        self._numbers: list[int] = []
        self._opening: Modality | None = None
        self._started = self._ended = False
        v = vocabulary
        self._pieces = (0, v.text_pieces)
        self._openers = tuple(
            (token, token + 1) for token, size in ((v.image, v.image_vocab_size), (v.audio, v.audio_vocab_size)) if size
        )

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def allowed(self) -> Allowed | None:
        v = self.vocabulary
        if self._ended:
            return None
        if not self._started:
            return Allowed(Modality.TEXT, ((v.document, v.document + 1),))
        if self._opening is not None:
            return Allowed(Modality.TEXT, ((v.number(1), v.number(MAX_NUMBER) + 1),))
        if self.remaining:
            span = self.spans[-1]
            if span.modality is Modality.IMAGE:
                return Allowed(Modality.IMAGE, ((0, v.image_codebook_size),))
            codebook = (self.length - span.start) % v.audio_codebooks
            low = codebook * v.audio_codebook_size
            return Allowed(Modality.AUDIO, ((low, low + v.audio_codebook_size),))
        end = ((v.end, v.end + 1),) if self.spans else ()
        return Allowed(Modality.TEXT, (self._pieces, *end, *self._openers))

    def advance(self, token_id: int, modality: int = Modality.TEXT) -> None:
        """Take the next token.

        Raises:
            SequenceError: it names the position, the token and what was expected there.
        """
        allowed = self.allowed
        if allowed is None or modality != allowed.modality or token_id not in allowed:
            raise SequenceError(self._unexpected(token_id, modality, allowed))
        if self._opening is not None:
            self._number(token_id)
        elif self.remaining:
            self.remaining -= 1
        else:
            self._text(token_id)
        self.length += 1

    def _text(self, token_id: int) -> None:
        v = self.vocabulary
        if token_id == v.document:
            self._started = True
        elif token_id == v.end:
            self._ended = True
        elif token_id in (v.image, v.audio):
            self._opening = Modality.IMAGE if token_id == v.image else Modality.AUDIO
        elif self.spans and self.spans[-1].modality is Modality.TEXT:
            self.spans[-1] = replace(self.spans[-1], length=self.spans[-1].length + 1)
        else:
            self.spans.append(Span(modality=Modality.TEXT, start=self.length, length=1))

    def _number(self, token_id: int) -> None:
        v = self.vocabulary
        self._numbers.append(token_id - v.number(1) + 1)
        if len(self._numbers) < 2:
            return
        first, second = self._numbers
        modality, self._opening, self._numbers = self._opening, None, []
        assert modality is not None
        rows, columns = first, second
        if modality is Modality.AUDIO:
            rows, columns = MAX_NUMBER * (first - 1) + second, v.audio_codebooks
        self.remaining = rows * columns
        self.spans.append(
            Span(modality=modality, start=self.length + 1, length=self.remaining, rows=rows, columns=columns)
        )

    def _unexpected(self, token_id: int, modality: int, allowed: Allowed | None) -> str:
        got = f"{_modality_label(modality)} token {token_id}"
        if modality == Modality.TEXT and self.vocabulary.text_pieces <= token_id < self.vocabulary.text_vocab_size:
            got = self.vocabulary.special_name(token_id)
        if allowed is None:
            return f"position {self.length}: {got} after <|end|>"
        ranges = " or ".join(str(low) if high == low + 1 else f"{low}..{high - 1}" for low, high in allowed.ranges)
        return f"position {self.length}: {got}, where the grammar expects {allowed.modality.label} ids {ranges}"


def _modality_label(modality: int) -> str:
    known = modality in Modality._value2member_map_
    return Modality(modality).label if known else f"unknown modality {modality}"


def parse(vocabulary: Vocabulary, token_ids: Ids, modality_ids: ModalityIds) -> list[Span]:
    """The spans of one whole document, read from its tokens alone.

    Args:
        token_ids: int32 [T].
        modality_ids: int8 [T].

    Raises:
        SequenceError: the tokens are not one document; the message names the first position that is wrong.
    """
    if token_ids.shape != modality_ids.shape or token_ids.ndim != 1:
        raise SequenceError(f"token ids {token_ids.shape} and modality ids {modality_ids.shape} must both be [T]")
    total = len(token_ids)
    if not total:
        raise SequenceError("the document is empty; it must open with <|document|>")
    grammar = Grammar(vocabulary)
    # Special tokens are stepped through; runs of pieces and of codes are checked whole, which is what makes this fast.
    plain_text = (modality_ids == Modality.TEXT) & (token_ids >= 0) & (token_ids < vocabulary.text_pieces)
    breaks = np.flatnonzero(~plain_text)
    at = 0
    while at < total:
        if grammar.remaining:
            stop = min(at + grammar.remaining, total)
            _check_codes(grammar, token_ids[at:stop], modality_ids[at:stop])
            grammar.remaining -= stop - at
            grammar.length = at = stop
            continue
        grammar.advance(int(token_ids[at]), int(modality_ids[at]))
        at += 1
        if plain_text[at - 1]:
            following = np.searchsorted(breaks, at)
            stop = int(breaks[following]) if following < len(breaks) else total
            grammar.spans[-1] = replace(grammar.spans[-1], length=stop - grammar.spans[-1].start)
            grammar.length = at = stop
    if not grammar.ended:
        raise SequenceError(f"position {total}: the document stops before <|end|>")
    return grammar.spans


def _check_codes(grammar: Grammar, token_ids: Ids, modality_ids: ModalityIds) -> None:
    """Check a run of codes at once; on a fault, step through it so that the message names the position."""
    v, span = grammar.vocabulary, grammar.spans[-1]
    low: NDArray[np.int32] | int = 0
    size = v.image_codebook_size
    if span.modality is Modality.AUDIO:
        low = (np.arange(len(token_ids), dtype=np.int32) % v.audio_codebooks) * v.audio_codebook_size
        size = v.audio_codebook_size
    local = token_ids - low
    if ((modality_ids == span.modality) & (local >= 0) & (local < size)).all():
        return
    for token_id, modality in zip(token_ids, modality_ids, strict=True):
        grammar.advance(int(token_id), int(modality))
