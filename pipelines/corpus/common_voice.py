"""Common Voice: `<locale>/validated.tsv`, a line a clip, beside the folder `clips`.

Enters: a release, or one locale of it. Leaves: one document a clip, sound and sentence laid out by a template. Always
holds: a line belongs to the slice in which its first byte lies, so any division of a table gives each clip exactly once, in
order; and memory holds one clip.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, ClassVar, Literal

from pydantic import Field

from pipelines.corpus.documents import Document, Dropped, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import CorpusError, RecordError
from pipelines.corpus.files import File, find_files, open_part, stamp
from pipelines.corpus.media_types import MODALITIES, ending, read_file
from pipelines.corpus.record_files import lines
from pipelines.corpus.side_files import below, parent
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality

CLIP_BYTES = 100
"""A table counts for so many times its size, because a line of some 300 bytes stands for a clip of some 30 kB."""

_MAX_LINE = 2**20


class CommonVoiceSource(CaptionedReader):
    """Reader `common_voice`. The language tag is the clip's locale."""

    decides_rows: ClassVar[frozenset[str]] = CaptionedReader.decides_rows | {"min_votes", "split"}

    reader: Literal["common_voice"]
    path: str
    """A folder: a release, of which all locales are read, or one locale; a table; or a glob of tables."""
    split: str = Field("validated", pattern=r"^[A-Za-z0-9_-]+$")
    """Which table: `validated`, `train`, `dev`, `test`, `other` ..."""
    min_votes: int | None = None
    """Drop clips whose up votes less their down votes are fewer."""
    max_file_mb: float = Field(64, gt=0)
    """Larger clips are quarantined."""

    def inputs(self) -> Iterator[Input]:
        for file in self._tables():
            size, etag = stamp([file])
            yield Input(uri=file.uri, size=size * CLIP_BYTES, etag=etag, parts=(file.part,), divisible=True)

    def _tables(self) -> Iterator[File]:
        try:
            yield from find_files(self.path, self.name, (".tsv",), glob=f"{self.split}.tsv")
        except CorpusError:
            yield from find_files(self.path, self.name, (".tsv",), glob=f"*/{self.split}.tsv")

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject | Dropped]:
        for piece in slices:
            (part,) = piece.input.parts
            source = f"{self.name}/{piece.input.uri}"
            # A line at byte b of the table begins at byte b * CLIP_BYTES of the input.
            start, stop = (-(-border // CLIP_BYTES) for border in (piece.start, piece.stop))
            try:
                with open_part(part) as file:
                    columns = _columns(file.readline(_MAX_LINE), part)
                    for offset, line in _lines(file, start, stop):
                        yield self._clip(source, part, offset, line, columns)
            except OSError as error:
                message = f"{part}: cannot be read: {error.strerror or error}; restore or remove it"
                yield Reject(source=f"{source}#{start}", position=0, reason="file: unreadable", error=message)
            except RecordError as error:
                # The slice in which the table begins tells of its header.
                if not start:
                    yield Reject(source=source, position=0, reason=error.reason, error=str(error))

    def _clip(
        self, source: str, part: str, offset: int, line: bytes | RecordError, columns: Sequence[str]
    ) -> Document | Reject | Dropped:
        place = f"{part}: line at byte {offset}"
        record = f"{source}#{offset}"
        try:
            if isinstance(line, RecordError):
                raise RecordError(line.reason, f"{place}: {line}")
            row = _row(line, columns, place)
            name, sentence = row["path"], row["sentence"].strip()
            record = f"{source}#{name}"
            if self.min_votes is not None and _votes(row, place) < self.min_votes:
                return Dropped(source=record, position=0, reason="min_votes")
            if not sentence:
                raise RecordError("transcript: missing", f"{place}: clip {name} has no sentence; remove the line")
            # Early releases leave the ending off.
            clip = name if ending(name) in MODALITIES else f"{name}.mp3"
            data = read_file(below(f"{parent(part)}/clips", clip), self.max_file_mb)
        except RecordError as error:
            return Reject(source=record, position=0, reason=error.reason, error=str(error))
        pieces = {
            Modality.TEXT: [RawSpan(modality=Modality.TEXT, text=sentence, uri=record)],
            Modality.AUDIO: [RawSpan(modality=Modality.AUDIO, data=data, uri=record)],
        }
        return self.document(record, 0, pieces, row.get("locale") or posixpath.basename(parent(part)))


def _columns(header: bytes, part: str) -> list[str]:
    columns = _cells(header.removeprefix(b"\xef\xbb\xbf"), f"{part}: header")
    if missing := {"path", "sentence"} - set(columns):
        has = ", ".join(columns[:20])
        message = f"{part}: no column {min(missing)!r} (it has: {has}); point `path` at a table of Common Voice"
        raise RecordError("table: column missing", message)
    return columns


def _lines(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | RecordError]]:
    """The lines that begin in a range, without the header and empty ones."""
    file.seek(0)
    for offset, line in lines(file, start, stop, _MAX_LINE):
        if offset and (isinstance(line, RecordError) or line.strip()):
            yield offset, line


def _row(line: bytes, columns: Sequence[str], place: str) -> dict[str, str]:
    cells = _cells(line, place)
    if len(cells) != len(columns):
        message = f"{place}: {len(cells)} cells, the header names {len(columns)} columns; mend or remove the line"
        raise RecordError("line: wrong number of cells", message)
    return dict(zip(columns, cells, strict=True))


def _cells(line: bytes, place: str) -> list[str]:
    """Cells are parted by tabs; a quotation mark is a character like any other."""
    try:
        return line.decode().rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        message = f"{place}: not UTF-8 at its byte {error.start}; write the table as UTF-8"
        raise RecordError("text: not UTF-8", message) from error


def _votes(row: Mapping[str, str], place: str) -> int:
    up, down = row.get("up_votes", ""), row.get("down_votes", "")
    if not (up.isdecimal() and down.isdecimal()):
        message = f"{place}: up_votes {up!r} and down_votes {down!r} are no numbers; leave min_votes out"
        raise RecordError("line: no votes", message)
    return int(up) - int(down)
