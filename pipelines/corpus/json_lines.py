"""JSON lines of text: each line an object, one field of which is a document's text.

Enters: a file, a folder or a glob. Leaves: one document a line. Always holds: a line belongs to the slice in which its
first byte lies, so any division of a file gives each line exactly once, in order; and memory holds one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import BinaryIO, ClassVar, Literal

from pydantic import Field

from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.files import find_files, open_part, stamp
from pipelines.corpus.reader import Reader
from pipelines.sequence import Modality

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")

_BUFFER = 2**20
_BOM = b"\xef\xbb\xbf"


class _LineError(ValueError):
    """A line that is no document: the class of fault, then what is wrong and what to do."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.reason = reason


class JsonLinesSource(Reader):
    """Reader `jsonl`. Blank lines are skipped."""

    decides_rows: ClassVar[frozenset[str]] = Reader.decides_rows | {"text_field", "id_field", "language_field"}

    reader: Literal["jsonl"]
    path: str
    """A file; a folder, of which all `.jsonl` files are read; or a glob, in which `**` crosses folders."""
    text_field: str = "text"
    id_field: str | None = None
    """Field with the record's name, unique in its file; without it, the line's byte offset names the record."""
    language_field: str | None = None
    """Field with the document's language tag, for `filters.languages`."""
    max_line_mb: float = Field(default=100, gt=0)
    """Longer lines are quarantined unread."""

    def inputs(self) -> Iterator[Input]:
        for file in find_files(self.path, self.name, (".jsonl", *(f".jsonl{suffix}" for suffix in COMPRESSED))):
            if file.uri.lower().endswith(COMPRESSED):
                raise CorpusError(f"source {self.name}: {file.path} is compressed; unpack it or glob around it")
            size, etag = stamp([file])
            yield Input(uri=file.uri, size=size, etag=etag, parts=(file.part,), divisible=True)

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            (part,) = piece.input.parts
            source = f"{self.name}/{piece.input.uri}"
            try:
                file = open_part(part, _BUFFER)
            except OSError as error:
                message = f"{part}: cannot be read: {error.strerror}; restore or remove it"
                yield Reject(source=f"{source}#{piece.start}", position=0, reason="file: unreadable", error=message)
                continue
            with file:
                for offset, line in lines(file, piece.start, piece.stop, int(self.max_line_mb * 1e6)):
                    try:
                        if document := self._document(source, offset, line):
                            yield document
                    except _LineError as error:
                        yield Reject(
                            source=f"{source}#{offset}",
                            position=0,
                            reason=error.reason,
                            error=f"{part}: line at byte {offset}: {error}",
                        )

    def _document(self, source: str, offset: int, line: bytes | None) -> Document | None:
        if line is None:
            raise _LineError(
                "line: too long", f"over max_line_mb = {self.max_line_mb:g}; raise that or split the record"
            )
        line = line.removeprefix(_BOM) if offset == 0 else line
        if not line.strip():
            return None
        try:
            # Decoded here, because the json module would guess at UTF-16 and UTF-32.
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _LineError(
                "text: not UTF-8", f"not UTF-8 at its byte {error.start}; write the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            raise _LineError("json: not valid", f"not JSON: {error}; write one object a line") from error
        if not isinstance(record, dict):
            raise _LineError("json: no object", f"a JSON {type(record).__name__}; write one object a line")
        text = self._field(record, self.text_field, "text_field", str)
        assert isinstance(text, str)
        if not text.strip():
            raise _LineError("text: empty", f"field {self.text_field!r} holds no text; leave such records out")
        name = self._field(record, self.id_field, "id_field", str, int) if self.id_field else offset
        language = self._field(record, self.language_field, "language_field", str) if self.language_field else ""
        for value in (text, str(name), str(language)):
            if not _is_unicode(value):
                raise _LineError(
                    "text: not Unicode", r"holds half of a surrogate pair (\ud800 to \udfff); write the whole"
                )
        return Document(
            source=f"{source}#{name}",
            position=0,
            spans=(RawSpan(modality=Modality.TEXT, text=text, uri=source),),
            language=str(language),
        )

    @staticmethod
    def _field(record: dict[str, object], field: str, setting: str, *kinds: type) -> object:
        if field not in record:
            has = ", ".join(sorted(record)[:10]) or "none"
            raise _LineError(
                "json: field missing", f"no field {field!r} (it has: {has}); correct {setting} or the record"
            )
        value = record[field]
        if type(value) not in kinds:
            raise _LineError(
                "json: wrong type",
                f"field {field!r} is a {type(value).__name__}, expected {' or '.join(k.__name__ for k in kinds)}",
            )
        return value


def lines(file: BinaryIO, start: int, stop: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines whose first byte lies in [start, stop), each with its offset; None for one over `limit` bytes."""
    offset = start
    if start:
        # The line before may end just here: its newline is the byte at start - 1.
        file.seek(start - 1)
        offset = start - 1 + _skip_line(file)
    while offset < stop and (line := file.readline(limit + 1)):
        if len(line) > limit and not line.endswith(b"\n"):
            yield offset, None
            offset += len(line) + _skip_line(file)
        else:
            yield offset, line
            offset += len(line)


def _skip_line(file: BinaryIO) -> int:
    """Go to the next line's first byte; how many bytes that was."""
    skipped = 0
    while chunk := file.readline(_BUFFER):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
