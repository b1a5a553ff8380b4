"""Files of records: JSON lines, plain or compressed, and Parquet.

Enters: a file, a folder or a glob. Leaves: one document a record. Always holds: a record belongs to the slice in which its
line, or its row group, begins, so any division of a file gives each record exactly once, in order; compressed files are
not divided; and memory holds one line, or one batch of rows.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar

from pydantic import Field

from pipelines.corpus.captions import json_object, texts, value_of
from pipelines.corpus.compressed import COMPRESSED, open_compressed
from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import find_files, open_part, stamp
from pipelines.corpus.media_types import ending
from pipelines.corpus.reader import Reader
from pipelines.corpus.row_groups import rows

_BUFFER = 2**20

Record = Mapping[str, Any]


class LineReader(Reader):
    """Base of the readers of JSON lines. Blank lines are skipped."""

    decides_rows: ClassVar[frozenset[str]] = Reader.decides_rows | {"id_field", "language_field"}
    endings: ClassVar[tuple[str, ...]] = (".jsonl", *(f".jsonl{ending}" for ending in COMPRESSED))

    path: str
    """A file; a folder, of which all files that end as the reader's do are read; or a glob, in which `**` crosses
    folders. `.gz`, `.zst`, `.bz2`, `.xz` and `.zip` (of one file) are unpacked as they are read."""
    id_field: str | None = None
    """Field with the record's name, unique in its file; without it, the byte at which its line begins, once unpacked,
    or the number of its row names the record."""
    language_field: str | None = None
    """Field with the document's language tag, for `filters.languages`."""
    max_line_mb: float = Field(default=100, gt=0)
    """Longer lines are quarantined unread."""
    max_expansion: float = Field(default=250, ge=1)
    """A compressed file that unpacks to over so many times its size, and to more than one line may have, is taken for a
    bomb: reading it stops there. Text is seldom packed 20 times."""

    @abstractmethod
    def spans(self, source: str, record: Record, place: str) -> Sequence[RawSpan]:
        """What the document of a record consists of.

        Args:
            source: identity of the document.
            place: where the record stands, for errors.

        Raises:
            RecordError: the record is no document.
        """

    def inputs(self) -> Iterator[Input]:
        for file in find_files(self.path, self.name, self.endings):
            size, etag = stamp([file])
            divisible = ending(file.uri) not in COMPRESSED
            yield Input(uri=file.uri, size=size, etag=etag, parts=(file.part,), divisible=divisible)

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            (part,) = piece.input.parts
            source = f"{self.name}/{piece.input.uri}"
            try:
                with self._open(piece.input) as file:
                    for number, place, record in self._records(file, piece):
                        if result := self._result(source, number, f"{part}: {place}", record):
                            yield result
            except OSError as error:
                message = f"{part}: cannot be read: {error.strerror or error}; restore or remove it"
                yield Reject(source=f"{source}#{piece.start}", position=0, reason="file: unreadable", error=message)
            except RecordError as error:
                message = f"{part}: {error}"
                yield Reject(source=f"{source}#{piece.start}", position=0, reason=error.reason, error=message)

    def _open(self, item: Input) -> BinaryIO:
        (part,) = item.parts
        if (suffix := ending(item.uri)) in COMPRESSED:
            return open_compressed(part, suffix, int(max(self.max_line_mb * 1e6, self.max_expansion * item.size)))
        return open_part(part, _BUFFER)

    def _records(self, file: BinaryIO, piece: Slice) -> Iterator[tuple[int, str, bytes | Record | RecordError]]:
        """The number of each record, its place in words, and what stands there."""
        start, stop = (piece.start, piece.stop) if piece.input.divisible else (0, sys.maxsize)
        for offset, line in lines(file, start, stop, int(self.max_line_mb * 1e6)):
            yield offset, f"line at byte {offset}", line

    def _result(
        self, source: str, number: int, place: str, record: bytes | Record | RecordError
    ) -> Document | Reject | None:
        """None for a blank line."""
        try:
            if isinstance(record, RecordError):
                raise RecordError(record.reason, f"{place}: {record}")
            if isinstance(record, bytes):
                if not record.strip():
                    return None
                record = json_object(record, place)
            named = self._name(record, place) if self.id_field else number
            language = ""
            if self.language_field:
                tags = texts(record, self.language_field, "language_field", place)
                language = tags[0] if tags else ""
            identity = f"{source}#{named}"
            spans = tuple(self.spans(identity, record, place))
        except RecordError as error:
            return Reject(source=f"{source}#{number}", position=0, reason=error.reason, error=str(error))
        return Document(source=identity, position=0, spans=spans, language=language)

    def _name(self, record: Record, place: str) -> str | int:
        assert self.id_field
        value = field(record, self.id_field, "id_field", place, str, int)
        return value if isinstance(value, int) else texts(record, self.id_field, "id_field", place)[0]


class TableReader(LineReader):
    """Base of the readers of JSON lines and Parquet files of the same fields."""

    endings: ClassVar[tuple[str, ...]] = (*LineReader.endings, ".parquet")

    max_row_group_mb: float = Field(default=2000, gt=0)
    """Larger row groups of Parquet files, unpacked, are quarantined unread: a column of one may have to be held whole."""

    @property
    @abstractmethod
    def columns(self) -> frozenset[str]:
        """What is read of a Parquet file, beside id and language."""

    def _records(self, file: BinaryIO, piece: Slice) -> Iterator[tuple[int, str, bytes | Record | RecordError]]:
        if ending(piece.input.uri) != ".parquet":
            yield from super()._records(file, piece)
            return
        named = (self.id_field, self.language_field)
        columns = self.columns | {name.partition(".")[0] for name in named if name}
        for number, row in rows(file, piece.start, piece.stop, columns, self.max_row_group_mb):
            yield number, f"row {number}", row


def field(record: Record, name: str, setting: str, place: str, *kinds: type) -> Any:
    """The value of a field, found as by `value_of`, which must be of one of these types.

    Raises:
        RecordError: there is none, or it is of another type.
    """
    value = value_of(record, name, setting, place)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        message = f"{place}: field {name!r} is a {type(value).__name__}, expected {expected}"
        raise RecordError("field: wrong type", message)
    return value


def lines(file: BinaryIO, start: int, stop: int, limit: int) -> Iterator[tuple[int, bytes | RecordError]]:
    """The lines whose first byte lies in [start, stop), each with its offset.

    A `RecordError` stands for a line over `limit` bytes, and for the line in which a compressed file breaks off.
    """
    offset = start
    try:
        if start:
            # The line before may end just here: its newline is the byte at start - 1.
            file.seek(start - 1)
            offset = start - 1 + _skip_line(file)
        while offset < stop and (line := file.readline(limit + 1)):
            if len(line) > limit and not line.endswith(b"\n"):
                length = len(line) + _skip_line(file)
                yield (
                    offset,
                    RecordError("line: too long", f"over max_line_mb = {limit / 1e6:g}; raise that or split it"),
                )
            else:
                length = len(line)
                yield offset, line
            offset += length
    except RecordError as error:
        yield offset, error


def _skip_line(file: BinaryIO) -> int:
    """Go to the next line's first byte; how many bytes that was."""
    skipped = 0
    while chunk := file.readline(_BUFFER):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped
