"""Parquet tables of captioned media, in the layouts of Hugging Face datasets and plain ones.

Enters: a file, a folder or a glob. Leaves: one document a row, its pieces laid out by a template. Always holds: a row
belongs to the slice in which its row group begins, so any division of a file gives each row exactly once, in order; only
the named columns are read; and memory holds a small batch of rows beside a page of each column, whatever the row group's
size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, ClassVar, Literal, Self

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from pipelines.corpus.captions import Captions, FieldMissingError, chosen, texts, value_of
from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import find_files, open_part, stamp
from pipelines.corpus.media_types import read_file
from pipelines.corpus.row_groups import rows
from pipelines.corpus.side_files import below, folder_part
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality


class ParquetSource(CaptionedReader):
    """Reader `parquet`. Fields are columns; `a.b` is the field `b` of a struct column `a`."""

    decides_rows: ClassVar[frozenset[str]] = CaptionedReader.decides_rows | {
        "audio_field",
        "captions",
        "id_field",
        "image_field",
        "language",
        "language_field",
        "text_field",
    }

    reader: Literal["parquet"]
    path: str
    """A file; a folder, of which all `.parquet` files are read; or a glob, in which `**` crosses folders."""
    text_field: str | None = None
    """Text, or a list of captions."""
    image_field: str | None = None
    """Pictures: structs of `bytes` and `path`, plain bytes, paths below `media`, or a list of these."""
    audio_field: str | None = None
    """Sounds, in the same ways."""
    id_field: str | None = None
    """Text or whole number, unique in its file; without it, the number of the row in its file names the document."""
    language_field: str | None = None
    """The document's language tag, for `filters.languages` and `{language}` in templates."""
    language: str = ""
    """Tag of rows that name none."""
    captions: Captions = "first"
    """Of a list of captions, the `first`, `all`, or `one` drawn for each document."""
    media: str | None = None
    """Folder below which the paths lie of pictures and sounds that are not in the table."""
    max_file_mb: float = Field(256, gt=0)
    """Documents with a larger picture or sound are quarantined."""
    max_row_group_mb: float = Field(8000, gt=0)
    """Larger row groups, unpacked, are quarantined unread. They are read in small batches, whatever their size."""

    @model_validator(mode="after")
    def _takes_something(self) -> Self:
        if not (self.text_field or self.image_field or self.audio_field):
            raise ValueError("name at least one of text_field, image_field and audio_field")
        return self

    @property
    def has_media(self) -> bool:
        return bool(self.image_field or self.audio_field)

    def inputs(self) -> Iterator[Input]:
        for file in find_files(self.path, self.name, (".parquet",)):
            size, etag = stamp([file])
            yield Input(uri=file.uri, size=size, etag=etag, parts=(file.part,), divisible=True)

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            (part,) = piece.input.parts
            source = f"{self.name}/{piece.input.uri}"
            try:
                with open_part(part) as file:
                    yield from self._rows(source, part, file, piece)
            except OSError as error:
                message = f"{part}: cannot be read: {error.strerror or error}; restore or remove it"
                yield Reject(source=f"{source}#{piece.start}", position=0, reason="file: unreadable", error=message)

    def _rows(self, source: str, part: str, file: BinaryIO, piece: Slice) -> Iterator[Document | Reject]:
        for number, row in rows(file, piece.start, piece.stop, self._columns, self.max_row_group_mb):
            place = f"{part}: row {number}"
            try:
                if isinstance(row, RecordError):
                    raise RecordError(row.reason, f"{place}: {row}")
                yield self._document(source, number, row, place)
            except FieldMissingError as error:
                # All other rows of the file lack it too.
                whole = FieldMissingError(error.name, error.setting, part, pq.read_schema(file).names)
                yield Reject(source=f"{source}#{number}", position=0, reason=whole.reason, error=str(whole))
                break
            except RecordError as error:
                yield Reject(source=f"{source}#{number}", position=0, reason=error.reason, error=str(error))

    @property
    def _columns(self) -> frozenset[str]:
        """To read. A column's own name may hold dots."""
        fields = (self.text_field, self.image_field, self.audio_field, self.id_field, self.language_field)
        return frozenset(column for name in fields if name for column in (name, name.partition(".")[0]))

    def _document(self, source: str, number: int, row: Mapping[str, Any], place: str) -> Document | Reject:
        name: Any = number
        if self.id_field:
            name = value_of(row, self.id_field, "id_field", place)
            if type(name) not in (str, int) or name == "":
                message = f"{place}: id {name!r} is neither text nor a whole number; correct id_field or the row"
                raise RecordError("field: wrong type", message)
        record = f"{source}#{name}"
        pieces: dict[Modality, list[RawSpan]] = defaultdict(list)
        if self.text_field:
            found = texts(row, self.text_field, "text_field", place)
            wanted = chosen(found, self.captions, self.seed, record, 0)
            pieces[Modality.TEXT] += [RawSpan(modality=Modality.TEXT, text=text, uri=record) for text in wanted]
        for modality, field, setting in (
            (Modality.IMAGE, self.image_field, "image_field"),
            (Modality.AUDIO, self.audio_field, "audio_field"),
        ):
            if field:
                value = value_of(row, field, setting, place)
                for cell in value if isinstance(value, list) else [value]:
                    if medium := self._medium(cell, modality, record, f"{place}, column {field}"):
                        pieces[modality].append(medium)
        tags = texts(row, self.language_field, "language_field", place) if self.language_field else []
        return self.document(record, 0, pieces, "".join(tags[:1]) or self.language)

    def _medium(self, cell: Any, modality: Modality, record: str, place: str) -> RawSpan | None:
        """What a cell holds of a picture or sound, or names of it."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if isinstance(data, str):
            data, path = None, data
        if data is None and path is None:
            return None
        if data is None and isinstance(path, str):
            if self.media is None:
                message = (
                    f"{place}: names {path!r} and holds no bytes; set `media` to the folder that such paths start from"
                )
                raise RecordError("media: not in the table", message)
            data = read_file(below(folder_part(self.media), path), self.max_file_mb)
        if not isinstance(data, bytes):
            message = f"{place}: a {type(data).__name__}, expected bytes, a path, or a struct of `bytes` and `path`"
            raise RecordError("field: wrong type", message)
        if len(data) > self.max_file_mb * 1e6:
            message = f"{place}: over max_file_mb = {self.max_file_mb:g}; leave it out or raise that limit"
            raise RecordError("file: too large", message)
        return RawSpan(modality=modality, data=data, uri=f"{record}/{path}" if path else record)
