"""Web pages in the layout of MMC4: sentences, and pictures each of which was matched with one of them.

Enters: JSON lines (released as `.jsonl.zip`) with `text_list` and `image_info`, and the folder of the pictures. Leaves: one
document a page. Always holds: sentences keep their order, and a picture stands right before or after its sentence.

Source: Multimodal C4 (Zhu et al., 2023).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar, Literal

from pipelines.corpus.captions import texts
from pipelines.corpus.documents import Document, RawSpan, joined
from pipelines.corpus.errors import RecordError
from pipelines.corpus.filters import draw
from pipelines.corpus.interleaved import InterleavedReader
from pipelines.corpus.record_files import Record, field
from pipelines.sequence import Modality


class Mmc4Source(InterleavedReader):
    """Reader `mmc4`. Sentences without a picture between them are joined by a space."""

    decides_rows: ClassVar[frozenset[str]] = InterleavedReader.decides_rows | {"picture_place", "min_similarity"}

    reader: Literal["mmc4"]
    picture_place: Literal["before", "after", "drawn"] = "drawn"
    """Where a picture stands from its sentence; `drawn` decides for each picture by the document's row id and the seed."""
    min_similarity: float | None = None
    """Pictures matched with less (`matched_sim`) are left out."""

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"text_list", "image_info"})

    def spans(self, source: str, record: Record, place: str) -> tuple[RawSpan, ...]:
        sentences = texts(record, "text_list", "the record", place)
        before: dict[int, list[RawSpan]] = defaultdict(list)
        after: dict[int, list[RawSpan]] = defaultdict(list)
        row_id = Document(source=source, position=0, spans=()).row_id
        for number, info in enumerate(field(record, "image_info", "the record", place, list)):
            here = f"{place}, picture {number}"
            if not isinstance(info, dict):
                raise RecordError("field: wrong type", f"{here}: a {type(info).__name__}, expected an object")
            if self.min_similarity is not None:
                similarity = field(info, "matched_sim", "the record", here, float, int)
                # Not `<`: what is no number (NaN) is left out too.
                if not similarity >= self.min_similarity:
                    continue
            first = self.picture_place == "before"
            if self.picture_place == "drawn":
                first = draw("picture", self.seed, row_id, number) < 0.5
            (before if first else after)[_sentence(info, len(sentences), here)] += self._picture(info, here)
        spans: list[RawSpan] = []
        for index, sentence in enumerate(sentences):
            spans += [*before[index], RawSpan(modality=Modality.TEXT, text=sentence, uri=source), *after[index]]
        if not (document := joined(spans, " ")):
            raise RecordError("document: empty", f"{place}: no sentence and no picture; leave such records out")
        return document

    def _picture(self, info: dict[str, Any], place: str) -> list[RawSpan]:
        name, url = (texts(info, key, "the record", place) for key in ("image_name", "raw_url"))
        if len(name) != 1:
            raise RecordError("field: wrong type", f"{place}: image_name is {name!r:.40}, expected a file's name")
        return self.picture(name[0], (url or name)[0], place)


def _sentence(info: dict[str, Any], count: int, place: str) -> int:
    """The index of the sentence that a picture belongs to."""
    index: int = field(info, "matched_text_index", "the record", place, int)
    if not 0 <= index < count:
        message = f"{place}: matched_text_index {index} of {count} sentences; correct the record"
        raise RecordError("mmc4: no such sentence", message)
    return index
