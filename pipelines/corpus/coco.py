"""COCO captions: `annotations/captions_train2017.json` names the pictures below `train2017` and their captions.

Enters: the folder that holds both, or one such file. Leaves: one document a picture, laid out with its captions by a
template. Always holds: any division of an input gives each picture exactly once, in order; and each worker reads the
captions of one file once and keeps them, which takes about as much memory as the file is long.
"""

from __future__ import annotations

import functools
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.corpus.captions import Captions, chosen, texts
from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import CorpusError, RecordError
from pipelines.corpus.files import find_files, open_part, stamp
from pipelines.corpus.json_arrays import array_items
from pipelines.corpus.media_types import endings, read_file
from pipelines.corpus.side_files import below, folder_part, parent
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality

PICTURE_BYTES = 200
"""A file of captions counts for so many times its size, because 800 bytes of it stand for a picture of 160 kB."""


class CocoSource(CaptionedReader):
    """Reader `coco`."""

    decides_rows: ClassVar[frozenset[str]] = CaptionedReader.decides_rows | {"captions", "language"}

    reader: Literal["coco"]
    path: str
    """A folder, a file of captions, or a glob of them."""
    glob: str = "**/captions_*.json"
    """Which files of the folder."""
    images: str | None = None
    """Folder of the pictures; by default the one beside the folder of the captions with the end of their name:
    `annotations/captions_val2017.json` goes with `val2017`."""
    captions: Captions = "first"
    """Of a picture's captions, the `first`, `all`, or `one` drawn for each document."""
    language: str = "en"
    max_file_mb: float = Field(256, gt=0)
    """Larger pictures are quarantined."""

    def inputs(self) -> Iterator[Input]:
        for file in find_files(self.path, self.name, (".json",), glob=self.glob):
            named = posixpath.splitext(posixpath.basename(file.uri))[0].removeprefix("captions_")
            folder = self.images or f"{parent(file.path, 2)}/{named}"
            try:
                next(find_files(folder, self.name, endings(Modality.IMAGE)))
            except CorpusError as error:
                message = (
                    f"source {self.name}: no pictures for {file.path} in {folder}; set its `images` to their folder"
                )
                raise CorpusError(message) from error
            size, etag = stamp([file])
            parts = (file.part, folder_part(folder))
            yield Input(uri=file.uri, size=size * PICTURE_BYTES, etag=etag, parts=parts, divisible=True)

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            part, folder = piece.input.parts
            source = f"{self.name}/{piece.input.uri}"
            try:
                index = _index(part, piece.input.etag)
            except RecordError as error:
                index = _Index(faults=[RecordError(error.reason, f"{part}: {error}")])
            if not piece.start:
                for number, fault in enumerate(index.faults):
                    yield Reject(source=source, position=number, reason=fault.reason, error=str(fault))
            # Picture i of n begins at i / n of the input.
            count, size = len(index.pictures), max(piece.input.size, 1)
            first, last = (-(-border * count // size) for border in (piece.start, piece.stop))
            for number in range(first, last):
                identity, name = index.pictures[number]
                yield self._picture(f"{source}#{identity}", folder, name, index.captions.get(identity, []))

    def _picture(self, record: str, folder: str, name: str, captions: Sequence[str]) -> Document | Reject:
        try:
            data = read_file(below(folder, name), self.max_file_mb)
        except RecordError as error:
            return Reject(source=record, position=0, reason=error.reason, error=str(error))
        uri = f"{self.name}/{posixpath.basename(folder)}/{name}"
        wanted = chosen(captions, self.captions, self.seed, record, 0)
        pieces = {
            Modality.TEXT: [RawSpan(modality=Modality.TEXT, text=text.strip(), uri=record) for text in wanted],
            Modality.IMAGE: [RawSpan(modality=Modality.IMAGE, data=data, uri=uri)],
        }
        return self.document(record, 0, pieces, self.language)


@dataclass(slots=True)
class _Index:
    """What a file of captions holds."""

    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Id and file name."""
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    faults: list[RecordError] = field(default_factory=list)


@functools.lru_cache(maxsize=1)
def _index(part: str, etag: str) -> _Index:
    """Of one state of a file: a worker reads many slices of it.

    Raises:
        RecordError: it cannot be read.
    """
    index = _Index()
    known: set[str] = set()
    try:
        with open_part(part) as file:
            for number, (array, item) in enumerate(array_items(file, ("images", "annotations"))):
                place = f"{part}: item {number} of images and annotations"
                try:
                    if array == "annotations":
                        index.captions[_id(item, "image_id", place)] += texts(item, "caption", "path", place)
                        continue
                    identity, names = _id(item, "id", place), texts(item, "file_name", "path", place)
                    if identity in known:
                        raise RecordError("picture: twice", f"{place}: a picture of id {identity!r} came before it")
                    known.add(identity)
                    index.pictures.append((identity, "".join(names)))
                except RecordError as error:
                    index.faults.append(error)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}; restore or remove it"
        raise RecordError("file: unreadable", message) from error
    for identity in (name for name in index.captions if name not in known):
        message = f"{part}: captions of picture {identity!r}, which `images` does not list; add or remove it"
        index.faults.append(RecordError("picture: missing", message))
    if not (index.pictures or index.faults):
        raise RecordError(
            "picture: none", "no picture under `images`; correct `path` or `glob`, or write it as COCO does"
        )
    return index


def _id(item: Any, name: str, place: str) -> str:
    identity = item.get(name) if isinstance(item, dict) else None
    if not isinstance(identity, int | str) or isinstance(identity, bool):
        message = f"{place}: {name} is {identity!r}, expected a whole number or text; write it as COCO does"
        raise RecordError("picture: no id", message)
    return str(identity)
