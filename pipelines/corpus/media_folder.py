"""A folder of media with same-stem captions: `a/apple.png`, `a/apple.txt` and `a/apple.ogg` are one document.

Enters: a folder. Leaves: one document a stem, its spans in one of the stated orders. Always holds: pictures and sounds
stay the bytes of their files; whoever tokenizes decodes them.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice, joined
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.files import existing_folder, files_below, open_part, stamp
from pipelines.corpus.reader import Reader
from pipelines.sequence import Modality

EXTENSIONS = {
    Modality.TEXT: ("txt",),
    Modality.IMAGE: ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    Modality.AUDIO: ("wav", "flac", "ogg", "opus", "mp3"),
}
"""Upper or lower case; other files are left alone."""

_MODALITY = {f".{extension}": modality for modality, extensions in EXTENSIONS.items() for extension in extensions}

Order = tuple[Literal["text", "image", "audio"], ...]


class MediaFolderSource(Reader):
    """Reader `media_folder`. Several media of one modality and stem follow one another by file name."""

    decides_rows: ClassVar[frozenset[str]] = frozenset({"orders", "seed"})

    reader: Literal["media_folder"]
    path: str
    glob: str = "**"
    """Which files to take, relative to `path`: `*` stays within a folder, `**` crosses folders."""
    orders: tuple[Order, ...] = Field(default=(("text", "image", "audio"), ("image", "audio", "text")), min_length=1)
    """Orders of the modalities; each document draws one by its row id. What an order does not name is left out."""
    seed: int = 0
    """Another seed draws other orders."""
    max_file_mb: float = Field(default=256, gt=0)
    """Larger files are quarantined, so that one file cannot take a worker's memory."""

    @field_validator("orders")
    @classmethod
    def _each_modality_once(cls, orders: tuple[Order, ...]) -> tuple[Order, ...]:
        for order in orders:
            if not order or len(set(order)) < len(order):
                raise ValueError(f"order {list(order)} must name at least one modality, and each at most once")
        return orders

    def inputs(self) -> Iterator[Input]:
        root = existing_folder(self.path, self.name)
        files = (f for f in files_below(root, self.glob, key=_stem) if _suffix(f.uri) in _MODALITY)
        empty = True
        for uri, group in itertools.groupby(files, key=lambda file: _stem(file.uri)):
            members = list(group)
            size, etag = stamp(file.path for file in members)
            yield Input(uri=uri, size=size, etag=etag, parts=tuple(file.part for file in members))
            empty = False
        if empty:
            known = ", ".join(sorted(_MODALITY))
            raise CorpusError(
                f"source {self.name}: nothing to read in {root}: no file that matches {self.glob!r} ends in {known}; "
                "correct its `path` or `glob`"
            )

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            yield self._document(piece.input)

    def _document(self, item: Input) -> Document | Reject:
        source = f"{self.name}/{item.uri}"

        def reject(reason: str, error: str) -> Reject:
            return Reject(source=source, position=0, reason=reason, error=error)

        spans: dict[str, list[RawSpan]] = defaultdict(list)
        for part in item.parts:
            modality = _MODALITY[_suffix(part)]
            try:
                with open_part(part) as file:
                    data = file.read(int(self.max_file_mb * 1e6) + 1)
            except OSError as error:
                return reject("file: unreadable", f"{part}: cannot be read: {error.strerror}; restore or remove it")
            if len(data) > self.max_file_mb * 1e6:
                return reject(
                    "file: too large", f"{part}: over max_file_mb = {self.max_file_mb:g}; split it or raise that limit"
                )
            uri = source + _suffix(part, keep_case=True)
            if modality is not Modality.TEXT:
                spans[modality.label].append(RawSpan(modality=modality, data=data, uri=uri))
                continue
            try:
                text = data.decode().removeprefix("\ufeff").strip()
            except UnicodeDecodeError as error:
                return reject("text: not UTF-8", f"{part}: not UTF-8 at byte {error.start}; save it as UTF-8")
            spans[modality.label].append(RawSpan(modality=modality, text=text, uri=uri))
        order = self._order(Document(source=source, position=0, spans=()).row_id)
        document = joined(span for modality in order for span in spans[modality])
        if not document:
            return reject("document: empty", f"{', '.join(item.parts)}: nothing in it for the order {list(order)}")
        return Document(source=source, position=0, spans=document)

    def _order(self, row_id: str) -> Order:
        # Keyed, so that it depends on neither the number of workers nor what else the folder holds.
        digest = hashlib.blake2b(f"order {self.seed} {row_id}".encode(), digest_size=8).digest()
        return self.orders[int.from_bytes(digest, "little") % len(self.orders)]


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix(name: str, *, keep_case: bool = False) -> str:
    suffix = posixpath.splitext(name)[1]
    return suffix if keep_case else suffix.lower()
