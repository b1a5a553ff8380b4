"""A folder of media with same-stem captions: `a/apple.png`, `a/apple.txt` and `a/apple.ogg` are one document.

Enters: a folder. Leaves: one document a stem, its pieces laid out by a template. Always holds: pictures and sounds
stay the bytes of their files; whoever tokenizes decodes them.
"""

from __future__ import annotations

import itertools
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.files import existing_folder, find_files, open_part, stamp
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality

EXTENSIONS = {
    Modality.TEXT: ("txt",),
    Modality.IMAGE: ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    Modality.AUDIO: ("wav", "flac", "ogg", "opus", "mp3"),
}
"""Upper or lower case; other files are left alone."""

_MODALITY = {f".{extension}": modality for modality, extensions in EXTENSIONS.items() for extension in extensions}


class MediaFolderSource(CaptionedReader):
    """Reader `media_folder`. Several media of one modality and stem follow one another by file name."""

    reader: Literal["media_folder"]
    path: str
    glob: str = "**"
    """Which files to take, relative to `path`: `*` stays within a folder, `**` crosses folders."""
    max_file_mb: float = Field(default=256, gt=0)
    """Larger files are quarantined, so that one file cannot take a worker's memory."""

    def inputs(self) -> Iterator[Input]:
        existing_folder(self.path, self.name)
        files = find_files(self.path, self.name, _MODALITY, glob=self.glob, key=_stem)
        for uri, group in itertools.groupby(files, key=lambda file: _stem(file.uri)):
            members = list(group)
            size, etag = stamp(members)
            yield Input(uri=uri, size=size, etag=etag, parts=tuple(file.part for file in members))

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            yield self._document(piece.input)

    def _document(self, item: Input) -> Document | Reject:
        source = f"{self.name}/{item.uri}"

        def reject(reason: str, error: str) -> Reject:
            return Reject(source=source, position=0, reason=reason, error=error)

        spans: dict[Modality, list[RawSpan]] = defaultdict(list)
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
                spans[modality].append(RawSpan(modality=modality, data=data, uri=uri))
                continue
            try:
                text = data.decode().removeprefix("\ufeff").strip()
            except UnicodeDecodeError as error:
                return reject("text: not UTF-8", f"{part}: not UTF-8 at byte {error.start}; save it as UTF-8")
            spans[modality].append(RawSpan(modality=modality, text=text, uri=uri))
        return self.document(source, 0, spans)


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix(name: str, *, keep_case: bool = False) -> str:
    suffix = posixpath.splitext(name)[1]
    return suffix if keep_case else suffix.lower()
