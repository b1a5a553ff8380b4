"""Files of a local corpus: found in a stable order, stamped, opened.

Enters: a folder and a glob. Leaves: `File`s, sorted by uri. Always holds: uris and parts are valid Unicode whatever the
file system holds, and the names of one folder at a time are in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import unquote_to_bytes

from pipelines.corpus.errors import CorpusError


@dataclass(frozen=True, slots=True)
class File:
    """A file of a corpus."""

    uri: str
    """Path relative to the root, with `/`; bytes that are not UTF-8 are written `\\xff`."""
    path: str
    """Where it lies, as the operating system has it."""

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
        try:
            status = os.stat(self.path)  # noqa: PTH116 - a Path object per file doubles the time of a listing
        except OSError as error:
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
    whole = Path(path).expanduser().absolute()
    empty = True
    if whole.is_file():
        found: Iterable[File] = [File(printable(whole.name), str(whole))]
    elif not whole.exists() and is_glob(path):
        literal = next(i for i, part in enumerate(whole.parts) if is_glob(part))
        root = existing_folder(str(Path(*whole.parts[:literal])), source)
        found = files_below(root, "/".join(whole.parts[literal:]), key)
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


def existing_folder(path: str, source: str) -> Path:
    """The folder that a source names.

    Raises:
        CorpusError: there is none.
    """
    folder = Path(path).expanduser().absolute()
    if folder.is_dir():
        return folder
    what = "is no folder" if folder.exists() else "does not exist"
    raise CorpusError(f"source {source}: {folder} {what}; set its `path` to the folder that holds the corpus")


def files_below(root: Path, glob: str = "**", key: Callable[[str], str] = str) -> Iterator[File]:
    """The files below a folder that match a glob, sorted by path, or by `key` of the file name within a folder.

    `*` and `?` stay within one folder, `**` crosses any number of them. Links are followed; names that begin with a dot
    are left out. A dangling link is a file: whoever opens it learns that it cannot be read.

    Raises:
        CorpusError: a folder cannot be listed, or a link leads back to a folder above it.
    """
    patterns = glob.split("/")
    # A tree may be vast and the glob name one corner of it.
    literal = next((i for i, p in enumerate(patterns[:-1]) if is_glob(p)), len(patterns) - 1)
    prefix = "".join(f"{p}/" for p in patterns[:literal])
    yield from _walk(str(root / prefix), prefix, patterns, key, frozenset())


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
    """Open a part of an input.

    Raises:
        OSError: it cannot be opened.
    """
    path: str | bytes = unquote_to_bytes(part.removeprefix("file://")) if part.startswith("file://") else part
    return open(path, "rb", buffering=buffering)  # type: ignore[return-value]  # noqa: PTH123 - bytes are no Path


def printable(name: str) -> str:
    """A name as the operating system has it, as valid Unicode."""
    return os.fsencode(name).decode(errors="backslashreplace")


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
        return any(_matches(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
