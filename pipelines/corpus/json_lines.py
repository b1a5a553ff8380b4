"""JSON lines of text: each line an object, one field of which is a document's text."""

from __future__ import annotations

from typing import ClassVar, Literal

from pipelines.corpus.captions import texts
from pipelines.corpus.documents import RawSpan
from pipelines.corpus.errors import RecordError
from pipelines.corpus.record_files import LineReader, Record, field
from pipelines.sequence import Modality


class JsonLinesSource(LineReader):
    """Reader `jsonl`."""

    decides_rows: ClassVar[frozenset[str]] = LineReader.decides_rows | {"text_field"}

    reader: Literal["jsonl"]
    text_field: str = "text"

    @property
    def has_media(self) -> bool:
        return False

    def spans(self, source: str, record: Record, place: str) -> list[RawSpan]:
        field(record, self.text_field, "text_field", place, str)
        (text,) = texts(record, self.text_field, "text_field", place)
        if not text.strip():
            message = f"{place}: field {self.text_field!r} holds no text; leave such records out"
            raise RecordError("text: empty", message)
        return [RawSpan(modality=Modality.TEXT, text=text, uri=source.rpartition("#")[0])]
