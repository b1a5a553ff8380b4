"""A folder of media with same-stem captions: `a/apple.png`, `a/apple.txt` and `a/apple.ogg` are one document.

Enters: a folder. Leaves: one document a stem, its pieces laid out by a template. Always holds: memory holds one document.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from pipelines.corpus.documents import Document, Input, Reject, Slice
from pipelines.corpus.files import existing_folder, find_files, stamp
from pipelines.corpus.media_types import read_file
from pipelines.corpus.samples import SampleFile, SampleReader


class MediaFolderSource(SampleReader):
    """Reader `media_folder`. Several media of one modality and stem follow one another by file name."""

    reader: Literal["media_folder"]
    path: str
    glob: str = "**"
    """Which files to take, relative to `path`: `*` stays within a folder, `**` crosses folders."""
    max_file_mb: float = Field(default=256, gt=0)
    """Larger files are quarantined, so that one file cannot take a worker's memory."""

    def inputs(self) -> Iterator[Input]:
        existing_folder(self.path, self.name)
        files = find_files(self.path, self.name, self.known_endings, glob=self.glob, key=_stem)
        for uri, group in itertools.groupby(files, key=lambda file: _stem(file.uri)):
            members = list(group)
            size, etag = stamp(members)
            yield Input(uri=uri, size=size, etag=etag, parts=tuple(file.part for file in members))

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            source = f"{self.name}/{piece.input.uri}"
            yield self.sample(source, 0, self._files(source, piece.input))

    def _files(self, source: str, item: Input) -> Iterator[SampleFile]:
        for part in item.parts:
            yield SampleFile(source + posixpath.splitext(part)[1], part, read_file(part, self.max_file_mb))


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]
