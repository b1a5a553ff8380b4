"""A sample: files of one stem, each known by its ending, become one document.

Enters: the files' names and bytes. Leaves: a document laid out by a template, or a reject. Always holds: pictures and
sounds stay the bytes of their files; whoever tokenizes decodes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pipelines.corpus.captions import Captions, chosen, json_object, texts
from pipelines.corpus.documents import Document, RawSpan, Reject
from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import StoredBytes
from pipelines.corpus.media_types import MODALITIES, decoded, ending
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality

_PLAIN = frozenset(MODALITIES)
_WITH_JSON = _PLAIN | {".json"}


@dataclass(frozen=True, slots=True)
class SampleFile:
    """A file of a sample."""

    uri: str
    """Its name in the dataset; the ending tells what it is."""
    place: str
    """Where it lies, for errors."""
    data: bytes | StoredBytes
    """Of texts and JSON always bytes."""


class SampleReader(CaptionedReader):
    """Base of the readers of such samples."""

    decides_rows: ClassVar[frozenset[str]] = CaptionedReader.decides_rows | {
        "captions",
        "json_field",
        "language",
        "language_field",
    }

    json_field: str | None = None
    """Field of a sample's `.json` file that holds its caption, nested ones as `a.b`: it stands in place of text files."""
    captions: Captions = "first"
    """Of a field that lists several captions, the `first`, `all`, or `one` drawn for each document."""
    language_field: str | None = None
    """Field of the `.json` file with the language tag, for `filters.languages` and `{language}` in templates."""
    language: str = ""
    """Tag of samples that name none."""

    @property
    def known_endings(self) -> frozenset[str]:
        """Of the files that a sample is made of."""
        return _WITH_JSON if self.json_field or self.language_field else _PLAIN

    def sample(self, source: str, position: int, files: Iterable[SampleFile]) -> Document | Reject:
        """The document of a sample.

        Args:
            source: its identity.
            position: tells it apart from others of that identity.
            files: of known endings; getting one may raise `RecordError`.
        """
        pieces: dict[Modality, list[RawSpan]] = defaultdict(list)
        language = ""
        captions: list[RawSpan] | None = None
        try:
            for file in files:
                modality = MODALITIES.get(ending(file.uri))
                if modality is Modality.TEXT:
                    assert isinstance(file.data, bytes)
                    text = decoded(file.data, file.place)
                    pieces[modality].append(RawSpan(modality=modality, text=text, uri=file.uri))
                elif modality:
                    pieces[modality].append(RawSpan(modality=modality, data=file.data, uri=file.uri))
                else:
                    assert isinstance(file.data, bytes)
                    record = json_object(file.data, file.place)
                    if self.json_field:
                        found = texts(record, self.json_field, "json_field", file.place)
                        wanted = chosen(found, self.captions, self.seed, source, position)
                        captions = [RawSpan(modality=Modality.TEXT, text=text.strip(), uri=file.uri) for text in wanted]
                    if self.language_field:
                        language = "".join(texts(record, self.language_field, "language_field", file.place)[:1])
        except RecordError as error:
            return Reject(source=source, position=position, reason=error.reason, error=str(error))
        if captions is not None:
            pieces[Modality.TEXT] = captions
        return self.document(source, position, pieces, language or self.language)
