"""LibriSpeech: `<speaker>/<chapter>/<speaker>-<chapter>.trans.txt` beside the chapter's recordings.

Enters: a folder at any level of it. Leaves: one document an utterance, recording and transcript laid out by a template.
Always holds: a chapter is one input, and memory holds its transcripts and one recording.
"""

from __future__ import annotations

import itertools
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from typing import ClassVar, Literal

from pydantic import Field

from pipelines.corpus.documents import Document, Input, RawSpan, Reject, Slice
from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import existing_folder, find_files, stamp
from pipelines.corpus.media_types import decoded, endings, read_file
from pipelines.corpus.templates import CaptionedReader
from pipelines.sequence import Modality

TRANSCRIPTS = ".trans.txt"


class LibriSpeechSource(CaptionedReader):
    """Reader `librispeech`. Recordings may be in any format that Braid reads."""

    decides_rows: ClassVar[frozenset[str]] = CaptionedReader.decides_rows | {"language", "lower_case"}

    reader: Literal["librispeech"]
    path: str
    """A folder: all of the corpus, a subset such as `train-clean-100`, or less."""
    glob: str = "**"
    """Which files to take, relative to `path`."""
    language: str = "en"
    lower_case: bool = False
    """Transcripts come in capitals without punctuation; this makes them lower case."""
    max_file_mb: float = Field(256, gt=0)
    """Larger recordings and transcript files are quarantined."""

    def inputs(self) -> Iterator[Input]:
        existing_folder(self.path, self.name)
        # What lies in a folder itself comes before what lies below it, so that a chapter's files follow one another.
        ahead = "\0{}".format
        wanted = (TRANSCRIPTS, *endings(Modality.AUDIO))
        files = find_files(self.path, self.name, wanted, glob=self.glob, key=ahead)
        for chapter, group in itertools.groupby(files, key=lambda file: posixpath.dirname(file.uri)):
            members = list(group)
            size, etag = stamp(members)
            yield Input(uri=chapter or ".", size=size, etag=etag, parts=tuple(file.part for file in members))

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            yield from self._chapter(piece.input)

    def _chapter(self, item: Input) -> Iterator[Document | Reject]:
        source = f"{self.name}/{item.uri}"
        recordings: dict[str, list[str]] = defaultdict(list)
        transcripts: dict[str, set[str]] = defaultdict(set)
        try:
            for part in item.parts:
                if part.lower().endswith(TRANSCRIPTS):
                    for utterance, said in _transcripts(decoded(read_file(part, self.max_file_mb), part)):
                        transcripts[utterance].add(said)
                else:
                    recordings[posixpath.splitext(posixpath.basename(part))[0]].append(part)
        except RecordError as error:
            yield Reject(source=source, position=0, reason=error.reason, error=str(error))
            return
        for name in sorted(recordings.keys() | transcripts.keys()):
            try:
                yield self._utterance(f"{source}#{name}", recordings.get(name, []), transcripts.get(name, set()))
            except RecordError as error:
                yield Reject(source=f"{source}#{name}", position=0, reason=error.reason, error=str(error))

    def _utterance(self, record: str, recordings: Sequence[str], transcripts: Set[str]) -> Document | Reject:
        if not recordings:
            message = f"{record}: a transcript without a recording beside it; restore the one or remove the other"
            raise RecordError("recording: missing", message)
        recording, transcript = recordings[0], next(iter(transcripts), "")
        if len(recordings) > 1:
            message = f"{record}: several recordings, {' and '.join(map(posixpath.basename, recordings))}; keep one"
            raise RecordError("recording: twice", message)
        if len(transcripts) > 1:
            message = (
                f"{recording}: {len(transcripts)} lines for it that differ in the {TRANSCRIPTS} beside it; keep one"
            )
            raise RecordError("transcript: twice", message)
        if not transcript:
            message = f"{recording}: no line for it in a {TRANSCRIPTS} beside it; restore the one or remove the other"
            raise RecordError("transcript: missing", message)
        text = transcript.lower() if self.lower_case else transcript
        uri = record + posixpath.splitext(recording)[1]
        data = read_file(recording, self.max_file_mb)
        pieces = {
            Modality.TEXT: [RawSpan(modality=Modality.TEXT, text=text, uri=record)],
            Modality.AUDIO: [RawSpan(modality=Modality.AUDIO, data=data, uri=uri)],
        }
        return self.document(record, 0, pieces, self.language)


def _transcripts(text: str) -> list[tuple[str, str]]:
    """Lines `84-121123-0000 GO DO YOU HEAR`."""
    pairs = (line.strip().partition(" ") for line in text.splitlines() if line.strip())
    return [(utterance, said.strip()) for utterance, _, said in pairs]
