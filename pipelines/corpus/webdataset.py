"""WebDataset: tars in which neighbouring members of one key, `a/cat.jpg` and `a/cat.txt`, are one sample.

Enters: a file, a folder or a glob of `.tar`, plain or compressed. Leaves: one document a sample, its pieces laid out by a
template. Always holds: a sample belongs to the slice in which its first header begins, so any division of a plain tar
gives each sample exactly once, in order; nothing is extracted or unpickled; and memory holds one sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, ClassVar, Literal

from pydantic import Field, PrivateAttr, field_validator

from pipelines.corpus.compressed import open_compressed
from pipelines.corpus.documents import Document, Input, Reject, Slice
from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import StoredBytes, find_files, open_part, stamp
from pipelines.corpus.media_types import EXTENSIONS, MODALITIES, ending
from pipelines.corpus.remote import is_remote
from pipelines.corpus.samples import SampleFile, SampleReader
from pipelines.corpus.tar import Mark, Member, Tar, TarError
from pipelines.sequence import Modality

COMPRESSED = {".tar.gz": ".gz", ".tgz": ".gz", ".tar.zst": ".zst", ".tar.bz2": ".bz2"}
"""Endings of tars that cannot be divided, and what packed them."""

_BUFFER = 2**20
"""Less than this is read rather than jumped over: an object store takes longer to answer than to send it."""
_LOCAL_BUFFER = 2**14

_LARGE = 2**16
"""Media of so many bytes, in a plain tar on disk, are read by whoever decodes them."""

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""The key goes to the first dot of the last component; the rest is the extension. Hidden files have no key."""
_SERVICE = re.compile(r"__[^/]*__(?:/|$)")
"""What the format keeps for itself."""


class WebDatasetSource(SampleReader):
    """Reader `webdataset`. Pictures, sounds, texts and, if a setting names a field of it, `.json` are taken; members of other
    extensions are left alone."""

    decides_rows: ClassVar[frozenset[str]] = SampleReader.decides_rows | {"extensions"}

    reader: Literal["webdataset"]
    path: str
    """A file; a folder, of which all tars are read; or a glob, in which `**` crosses folders."""
    extensions: tuple[str, ...] | None = Field(None, min_length=1)
    """Take these alone, each all that follows the key: `jpg` and not `mask.jpg`."""
    max_sample_mb: float = Field(256, gt=0)
    """Larger samples are quarantined, so that one cannot take a worker's memory."""
    max_expansion: float = Field(250, ge=1)
    """A compressed tar that unpacks to more than so many times its size is taken for a bomb."""

    _passed: dict[tuple[str, str], dict[int, tuple[Mark, int]]] = PrivateAttr(default_factory=dict)
    """By tar and where a slice of it ended: the first sample behind that, and its number. Whoever reads the next slice need
    not walk over all that lies before it."""

    @field_validator("extensions")
    @classmethod
    def _known(cls, extensions: tuple[str, ...] | None) -> tuple[str, ...] | None:
        known = [*(extension for several in EXTENSIONS.values() for extension in several), "json"]
        for extension in extensions or ():
            if extension.rpartition(".")[2] not in known:
                raise ValueError(f"{extension!r} is of no known kind; known, in lower case: {', '.join(known)}")
        return extensions

    def inputs(self) -> Iterator[Input]:
        for file in find_files(self.path, self.name, (".tar", *COMPRESSED)):
            size, etag = stamp([file])
            divisible = _packed(file.uri) is None
            yield Input(uri=file.uri, size=size, etag=etag, parts=(file.part,), divisible=divisible)

    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject]:
        for piece in slices:
            (part,) = piece.input.parts
            packed = _packed(piece.input.uri)
            stored = packed is None and not is_remote(part)
            source = f"{self.name}/{piece.input.uri}"
            try:
                if packed:
                    most = int(max(piece.input.size, 2**20) * self.max_expansion)
                    file = open_compressed(part, packed, most)
                else:
                    file = open_part(part, _LOCAL_BUFFER if stored else _BUFFER)
            except OSError as error:
                message = f"{part}: cannot be read: {error.strerror or error}; restore or remove it"
                yield Reject(source=f"{source}#{piece.start}", position=0, reason="file: unreadable", error=message)
                continue
            with file:
                for sample in self._samples(file, piece, part, seekable=packed is None, stored=stored):
                    yield self._document(source, part, sample)

    def _samples(self, file: BinaryIO, piece: Slice, part: str, *, seekable: bool, stored: bool) -> Iterator[_Sample]:
        """The samples of a slice, each with its content or with what is wrong with it."""
        # The last slice also tells of what is wrong behind the last byte that was listed.
        stop = None if piece.stop == piece.input.size or not seekable else piece.stop
        tar_file = part, piece.input.etag
        # One that cannot be divided has none.
        passed = self._passed.get(tar_file, {})
        before = max((place for place in passed if place <= piece.start), default=None)
        begin, count = passed[before] if before is not None else (None, 0)
        sample: _Sample | None = None
        try:
            tar = Tar(file, seekable=seekable, jump=_LOCAL_BUFFER if stored else _BUFFER, begin=begin)
            for member in tar.members():
                if not (named := self._named(member)):
                    continue
                key, extension = named
                if sample is None or sample.key != key:
                    if sample and sample.begin >= piece.start:
                        yield sample
                    if stop is not None and member.begin >= stop:
                        self._passed.setdefault(tar_file, {})[stop] = tar.before(member), count
                        return
                    sample = _Sample(key, position=count, begin=member.begin)
                    count += 1
                if sample.begin >= piece.start and not sample.fault and self._wants(sample, member, extension, part):
                    sample.members.append((member.name, self._content(tar, member, part, stored=stored)))
            if sample and sample.begin >= piece.start:
                yield sample
            sample = None
            tar.require_end()
        except (RecordError, OSError) as error:
            at = error.offset if isinstance(error, TarError) else 0
            # The sample may go on where reading stops: half of it would be worse than none.
            lost = sample or _Sample("", position=0, begin=at)
            if lost.begin >= piece.start and (stop is None or lost.begin < stop):
                reason = "file: unreadable" if isinstance(error, OSError) else error.reason
                which = f"sample {lost.key}" if sample else f"byte {at}"
                lost.fault = RecordError(reason, f"{part}: nothing from {which} on is read: {error}")
                yield lost

    def _content(self, tar: Tar, member: Member, part: str, *, stored: bool) -> bytes | StoredBytes:
        if stored and member.size >= _LARGE and MODALITIES.get(ending(member.name), Modality.TEXT) is not Modality.TEXT:
            tar.require_whole(member)
            return StoredBytes(part, member.data, member.size)
        return tar.content(member)

    def _named(self, member: Member) -> tuple[str, str] | None:
        """Key and extension of a member, if it belongs to a sample."""
        match = _NAME.fullmatch(member.name)
        if member.kind == "folder" or not match or _SERVICE.match(member.name):
            return None
        key, extension = match[1], match[2].lower()
        return (key, extension) if member.kind == "file" or self._takes(extension) else None

    def _takes(self, extension: str) -> bool:
        if self.extensions is not None and extension not in self.extensions:
            return False
        return f".{extension.rpartition('.')[2]}" in self.known_endings

    def _wants(self, sample: _Sample, member: Member, extension: str, part: str) -> bool:
        """Whether to read a member; one that should be read and cannot be spoils its sample."""
        if not self._takes(extension):
            if len(sample.left) < 10:
                sample.left.append(extension)
            return False
        sample.size += member.size
        if member.kind != "file":
            fault = ("member: not a file", f"is a {member.kind}, which is never opened; pack the file itself")
        elif member.name.startswith("/") or ".." in member.name.split("/"):
            fault = ("member: unsafe name", "its name leads out of the tar; pack it under a relative one")
        elif extension in sample.taken:
            fault = ("member: twice", "the sample has a member of that name already; keep one")
        elif sample.size > self.max_sample_mb * 1e6:
            fault = ("sample: too large", f"over max_sample_mb = {self.max_sample_mb:g}; split it or raise that limit")
        else:
            sample.taken.add(extension)
            return True
        sample.fault = RecordError(fault[0], f"{part}: member {member.name}: {fault[1]}")
        sample.members.clear()
        return False

    def _document(self, source: str, part: str, sample: _Sample) -> Document | Reject:
        record = f"{source}#{sample.key}" if sample.key else source
        if not (fault := sample.fault) and not sample.members:
            has = ", ".join(sample.left)
            message = (
                f"{part}: sample {sample.key} has only {has}; leave it out or correct `extensions` and `json_field`"
            )
            fault = RecordError("sample: nothing to take", message)
        if fault:
            return Reject(source=record, position=sample.position, reason=fault.reason, error=str(fault))
        files = (SampleFile(f"{source}/{name}", f"{part}: member {name}", data) for name, data in sample.members)
        return self.sample(record, sample.position, files)


@dataclass(slots=True)
class _Sample:
    """Members of one key that follow one another."""

    key: str
    position: int
    """Number of the sample in its tar: a key that comes again is another sample."""
    begin: int
    members: list[tuple[str, bytes | StoredBytes]] = field(default_factory=list)
    """Name and content of those that are taken."""
    taken: set[str] = field(default_factory=set)
    """Their extensions."""
    left: list[str] = field(default_factory=list)
    """Extensions of others, the first few."""
    size: int = 0
    fault: RecordError | None = None


def _packed(uri: str) -> str | None:
    return next((ending for name, ending in COMPRESSED.items() if uri.lower().endswith(name)), None)
