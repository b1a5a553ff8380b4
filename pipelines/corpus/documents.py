"""What readers make: documents of raw spans, and what they could not read.

Enters: nothing; these are the types between the readers and the tokenize job. Always holds: a document has at least one
span, no text span is empty, and no two spans of plain text follow one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipelines.corpus.files import StoredBytes
from pipelines.sequence import Ids, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSpan:
    """One piece of a document before its tokenizer: text, the bytes of a media file as they lie on disk, or codes."""

    modality: Modality
    text: str = ""
    data: bytes | StoredBytes = b""
    codes: Ids | None = None
    """What another job has tokenized already: text int32 [pieces], image [rows, columns], audio [frames, K], without
    offsets; None for what is still raw."""
    uri: str = ""

    @property
    def content(self) -> bytes:
        """The bytes of a media file, read now if they are not in memory.

        Raises:
            OSError: they cannot be read.
        """
        return self.data if isinstance(self.data, bytes) else self.data.read()


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document of a corpus."""

    source: str
    """Identity of where it came from: `<source name>/<path or record>`; the train/validation split hashes it."""
    position: int
    """Index of the document among those of the same source identity."""
    spans: tuple[RawSpan, ...]
    language: str = ""
    """As the corpus tags it, such as `en` or `pt-BR`; empty where it does not."""

    def loaded(self) -> Document:
        """With the bytes of all media in memory.

        Raises:
            OSError: some cannot be read.
        """
        if not any(isinstance(span.data, StoredBytes) for span in self.spans):
            return self
        spans = (replace(s, data=s.content) if isinstance(s.data, StoredBytes) else s for s in self.spans)
        return replace(self, spans=tuple(spans))

    @property
    def row_id(self) -> str:
        """32 hexadecimal digits over source identity and position: the row's name in the dataset."""
        return _digest(self.source.encode(), str(self.position).encode())

    @property
    def content_hash(self) -> str:
        """32 hexadecimal digits over the raw content alone, wherever it came from."""
        return _digest(*(part for s in self.spans for part in (s.modality.label.encode(), s.text.encode(), _raw(s))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """What could not be read or tokenized, and why: a row of the quarantine table."""

    source: str
    position: int
    reason: str
    """A short class of fault, such as `picture: truncated` or `text: not UTF-8`: rejects are counted by it."""
    error: str
    """The whole message: place, value, remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A document that is whole but not wanted: a filter of the recipe took it out. Counted by reason, kept nowhere."""

    source: str
    position: int
    reason: str
    """The filter, such as `max_aspect`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One thing that a reader lists: a file, or the files of one sample. The ledger remembers it by uri and etag."""

    uri: str
    """Identity under the source, stable when the corpus moves: the path relative to the source's root."""
    size: int
    """Bytes."""
    etag: str
    """Changes whenever the content may have: modification time and size, or the object store's etag."""
    parts: tuple[str, ...]
    """The files to open, as paths that every worker can reach."""
    divisible: bool = False
    """Whether a byte range of it can be read alone; such inputs are split into several units. What belongs to a range is
    what begins in it: the lines, row groups or samples whose first byte lies there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """A byte range of an input: what one work unit reads of it. Indivisible inputs are always whole."""

    input: Input
    start: int
    stop: int


def joined(spans: Iterable[RawSpan], separator: str = "\n") -> tuple[RawSpan, ...]:
    """The spans with empty texts dropped and neighbouring texts joined, as a document requires."""
    result: list[RawSpan] = []
    for span in spans:
        if span.modality is Modality.TEXT and span.codes is None:
            if not span.text.strip():
                continue
            if result and result[-1].modality is Modality.TEXT and result[-1].codes is None:
                result[-1] = replace(result[-1], text=result[-1].text + separator + span.text)
                continue
        result.append(span)
    return tuple(result)


def _raw(span: RawSpan) -> bytes:
    if span.codes is not None:
        return repr(span.codes.shape).encode() + span.codes.astype("<i4").tobytes()
    return span.content


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # Lengths in front keep ("ab", "c") and ("a", "bc") apart.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
