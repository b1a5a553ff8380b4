"""Files of a corpus, on disk or in an object store: found in a stable order, stamped, opened.

Enters: a folder and a glob. Leaves: `File`s, sorted by uri, in the same order wherever they lie. Always holds: uris and
parts are valid Unicode whatever the file system holds; of a local tree the names of one folder at a time are in memory, of
an object store those of all objects below the folder.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal
from urllib.parse import unquote_to_bytes

from pipelines.corpus import remote
from pipelines.corpus.errors import CorpusError, TransientError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BUFFER = 2**17

_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""What network file systems say when their server is away."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a corpus."""

    uri: str
    """Path relative to the root, with `/`; bytes that are not UTF-8 are written `\\xff`."""
    path: str
    """Where it lies, as the operating system has it, or a URI of an object store."""
    listed: tuple[int, str] | None = None
    """The stamp, where the listing told it: no object store is asked for each."""

    @property
    def part(self) -> str:
        """The path as valid Unicode, for `open_part`: a name that is not UTF-8 becomes a `file:` URI."""
        try:
            self.path.encode()
        except UnicodeEncodeError:
            return Path(self.path).as_uri()
        return self.path

    def stamp(self) -> tuple[int, str]:
        """Bytes, and what changes with size or modification time; a file that cannot be read has a stamp too."""
        if self.listed:
            return self.listed
        try:
            status = os.stat(self.path)  # noqa: PTH116 - a Path object per file doubles the time of a listing
        except OSError as error:
            _require_answer(self.path, error)
            return 0, f"unreadable {error.errno}"
        return status.st_size, f"{status.st_size} {status.st_mtime_ns}"


def find_files(
    path: str, source: str, endings: Collection[str], *, glob: str = "**", key: Callable[[str], str] = str
) -> Iterator[File]:
    """The files that a source names: one file, all below a folder that end so and match the glob, or a glob's.

    Args:
        path: a file; a folder; or a glob, in which `**` crosses folders and which alone decides about endings.
        endings: lower case, each with its dot.
        key: order within a folder; see `files_below`.

    Raises:
        CorpusError: nothing there, or nothing that matches.
    """
    whole = located(path)
    empty = True
    found: Iterable[File]
    if (kind := _kind_of(whole)) == "file":
        found = _one(whole)
    elif kind is None and is_glob(path):
        root, pattern = _split(whole)
        found = files_below(existing_folder(root, source), pattern, key)
    else:
        below = files_below(existing_folder(path, source), glob, key)
        found = (file for file in below if file.uri.lower().endswith(tuple(endings)))
    for file in found:
        empty = False
        yield file
    if empty:
        known = ", ".join(sorted(endings))
        raise CorpusError(
            f"source {source}: nothing to read at {path}: no file that matches {glob!r} ends in {known}; "
            "correct its `path` or `glob`"
        )


def existing_folder(path: str, source: str) -> str:
    """The folder that a source names.

    Raises:
        CorpusError: there is none.
    """
    folder = located(path)
    if (kind := _kind_of(folder)) == "folder":
        return folder
    what = "does not exist" if kind is None else "is no folder"
    raise CorpusError(f"source {source}: {folder} {what}; set its `path` to the folder that holds the corpus")


def located(path: str) -> str:
    """A path of a recipe as every worker can use it: an absolute one, or the URI of an object store."""
    return path.rstrip("/") if remote.is_remote(path) else str(Path(path).expanduser().absolute())


def files_below(root: str | Path, glob: str = "**", key: Callable[[str], str] = str) -> Iterator[File]:
    """The files below a folder that match a glob, sorted by path, or by `key` of the file name within a folder.

    `*` and `?` stay within one folder, `**` crosses any number of them. Links are followed; names that begin with a dot
    are left out. A dangling link is a file: whoever opens it learns that it cannot be read.

    Raises:
        CorpusError: a folder cannot be listed, or a link leads back to a folder above it.
        TransientError: an object store cannot be listed now.
    """
    patterns = glob.split("/")
    # A tree may be vast and the glob name one corner of it.
    literal = next((i for i, p in enumerate(patterns[:-1]) if is_glob(p)), len(patterns) - 1)
    prefix = "".join(f"{p}/" for p in patterns[:literal])
    folder = f"{root}/{prefix}"
    if remote.is_remote(folder):
        yield from _stored(folder.rstrip("/"), prefix, patterns, key)
    else:
        yield from _walk(folder, prefix, patterns, key, frozenset())


def is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def stamp(files: Iterable[File]) -> tuple[int, str]:
    """Bytes of the files together, and an etag that changes with their names, sizes or modification times."""
    total = 0
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size, state = file.stamp()
        total += size
        digest.update(os.fsencode(os.path.basename(file.path)) + b"\0" + state.encode() + b"\0")  # noqa: PTH119
    return total, digest.hexdigest()


def open_part(part: str, buffering: int = -1) -> BinaryIO:
    """Open a part of an input for reading from any place in it.

    Raises:
        OSError: it cannot be opened; reads may raise it too.
        TransientError: the network or a store fails; reads may raise it too.
    """
    raw: io.RawIOBase
    if remote.is_remote(part):
        raw = remote.RemoteFile(part)
    else:
        with _transient(part):
            raw = _LocalFile(unquote_to_bytes(part.removeprefix("file://")) if part.startswith("file://") else part)
    if buffering == 0:
        return raw  # type: ignore[return-value]
    return io.BufferedReader(raw, _BUFFER if buffering < 0 else buffering)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Bytes that lie in a file on disk, to be read where they are needed: large media need not go through the process that
    reads a corpus for others that decode it."""

    part: str
    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: they cannot be read, or are no longer there.
            TransientError: their file system is away.
        """
        with open_part(self.part) as file:
            file.seek(self.start)
            data = file.read(self.size)
        if missing := self.size - len(data):
            raise OSError(errno.ENODATA, f"{missing:,} of the {self.size:,} bytes from {self.start:,} on are gone")
        return data


class _LocalFile(io.FileIO):
    def readinto(self, buffer: Buffer) -> int:
        with _transient(self.name):
            return super().readinto(buffer)  # type: ignore[return-value]

    def readall(self) -> bytes:
        with _transient(self.name):
            return super().readall()


@contextmanager
def _transient(part: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _require_answer(part, error)
        raise


def _require_answer(part: object, error: OSError) -> None:
    """
    Raises:
        TransientError: the error says nothing of the file, but that its file system is away.
    """
    if error.errno in _TRANSIENT:
        raise TransientError(
            f"{part}: {error.strerror}: its file system does not answer as it should; look at its disk or server"
        ) from error


def printable(name: str) -> str:
    """A name as the operating system has it, as valid Unicode."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _kind_of(path: str) -> str | None:
    """`file` or `folder`; None where there is nothing."""
    if remote.is_remote(path):
        return remote.kind(path)[0]
    return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None  # noqa: PTH110, PTH112


def _one(path: str) -> Iterator[File]:
    name = path.rpartition("/")[2]
    yield File(printable(name), path, remote.kind(path)[1] if remote.is_remote(path) else None)


def _split(path: str) -> tuple[str, str]:
    """A path before its first part with a wildcard, and the rest."""
    parts = path.split("/")
    literal = next(i for i, part in enumerate(parts) if is_glob(part))
    return "/".join(parts[:literal]) or "/", "/".join(parts[literal:])


def _stored(folder: str, prefix: str, patterns: list[str], key: Callable[[str], str]) -> Iterator[File]:
    """The objects below a folder that match, in the order in which `_walk` gives files."""

    def place(names: list[str]) -> list[tuple[str, str]]:
        return [*((f"{name}/", name) for name in names[:-1]), (key(names[-1]), names[-1])]

    found = []
    try:
        for item in remote.listing(folder):
            names = item.path.split("/")
            hidden = any(name.startswith(".") for name in names)
            if not hidden and _matches((prefix + item.path).split("/"), patterns):
                found.append((place(names), item))
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be listed: {error.strerror}; make it readable or leave it out") from error
    for _, item in sorted(found, key=lambda pair: pair[0]):
        yield File(prefix + item.path, f"{folder}/{item.path}", item.stamp)


def _walk(
    folder: str, prefix: str, patterns: list[str], key: Callable[[str], str], above: frozenset[tuple[int, int]]
) -> Iterator[File]:
    try:
        status = os.stat(folder)  # noqa: PTH116
        with os.scandir(folder) as entries:
            # A folder sorts as `name/`, which puts what it holds where the whole path belongs.
            found = sorted(
                (f"{name}/" if kind == "folder" else key(name), name, kind, entry.path)
                for entry in entries
                if not (name := printable(entry.name)).startswith(".") and (kind := _kind(entry))
            )
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be listed: {error.strerror}; make it readable or leave it out") from error
    identity = status.st_dev, status.st_ino
    if identity in above:
        raise CorpusError(f"{folder}: a link that leads back to a folder above it; remove it or leave it out by a glob")
    for _, name, kind, path in found:
        if kind == "folder":
            # A folder of a million clips may lie below the table that names them.
            if "**" in patterns or prefix.count("/") + 1 < len(patterns):
                yield from _walk(path, f"{prefix}{name}/", patterns, key, above | {identity})
        elif _matches((prefix + name).split("/"), patterns):
            yield File(prefix + name, path)


def _kind(entry: os.DirEntry[str]) -> Literal["file", "folder"] | None:
    """None for pipes and devices: opening one would wait for ever."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else None  # noqa: PTH110
    except OSError:
        # Such as a link to itself.
        return "file"


def _matches(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return len(patterns) == 1 or any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
