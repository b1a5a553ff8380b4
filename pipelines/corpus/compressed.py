"""Compressed files, unpacked as they are read: `.gz`, `.zst`, `.bz2`, `.xz`, and `.zip` with one file in it.

Enters: a part of an input. Leaves: a binary file of what it unpacks to. Always holds: the members of a concatenation are
read whole, one after the other; whatever can be unpacked before a fault is given before the fault is raised; and memory
is bounded, because what asks for a window of over 128 MiB is refused.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import pyarrow as pa

from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import open_part

_STEP = 2**16
"""Bytes to unpack at a time."""

_XZ_MEMORY = 130 * 2**20
"""A window of 128 MiB, and what goes with it."""

_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException)
"""What reading raises where the bytes are not of their format."""


class _Stream(Protocol):
    """What unpacks a file from front to back."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _Members:
    """What concatenated bzip2 or xz streams unpack to: Python's own classes for it ignore a stream that is damaged."""

    def __init__(self, file: BinaryIO, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file = file
        self._new = new
        self._stream = new()
        self._started = False
        """Whether the stream has got any input."""

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._stream.eof:
                # Zeros may stand between xz streams.
                data = self._stream.unused_data.lstrip(b"\0")
                self._stream, self._started = self._new(), False
            if not data and self._stream.needs_input and not (data := self._file.read(_STEP)):
                if self._started:
                    raise EOFError
                return b""
            self._started = True
            if unpacked := self._stream.decompress(data, size):
                return unpacked

    def close(self) -> None:
        pass


def _zip_member(file: BinaryIO) -> _Stream:
    try:
        archive = zipfile.ZipFile(file)
        # Finder puts each file's attributes into a second one.
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        if len(members) == 1:
            if members[0].flag_bits & 1 or members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{members[0].filename} is encrypted, or not compressed by deflate")
            return archive.open(members[0])
    except (FileNotFoundError, PermissionError):
        raise
    # Flipped bits may also ask for another version of zip, or leave names that are not UTF-8.
    except (*_FAULTS, NotImplementedError, ValueError) as error:
        message = f"no zip file that can be read: {error}; fetch it again or unpack it"
        raise RecordError("archive: damaged", message) from error
    raise RecordError("archive: several files", f"a zip of {len(members)} files, expected one; unpack it")


_UNPACKED: dict[str, Callable[[BinaryIO], _Stream]] = {
    ".gz": lambda file: pa.CompressedInputStream(file, "gzip"),
    ".zst": lambda file: pa.CompressedInputStream(file, "zstd"),
    ".bz2": lambda file: _Members(file, bz2.BZ2Decompressor),
    ".xz": lambda file: _Members(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)),
    ".zip": _zip_member,
}

COMPRESSED = tuple(_UNPACKED)
"""Endings, lower case."""


def open_compressed(part: str, ending: str, most: int) -> BinaryIO:
    """What a part of an input unpacks to.

    Args:
        ending: one of `COMPRESSED`.
        most: bytes; a file that unpacks to more is taken for a bomb.

    Returns:
        A file to be read from front to back. Reading raises `RecordError` where no more can be had, and `OSError` where
        the part is refused or gone.

    Raises:
        OSError: the part cannot be opened.
    """
    return io.BufferedReader(_Unpacked(part, ending, most), 2**20)


class _Unpacked(io.RawIOBase):
    def __init__(self, part: str, ending: str, most: int) -> None:
        self._part = part
        self._unpacked = _UNPACKED[ending]
        self._most = most
        self._given = 0
        self._step = _STEP
        self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(min(len(buffer), self._step))
        except (FileNotFoundError, PermissionError):
            # Of the store: nothing is wrong with what it has.
            raise
        except _FAULTS as error:
            if self._step == 1:
                raise _fault(error) from error
            # A read that fails gives nothing of what it had unpacked: begin again, and come as far as single bytes can.
            self._begin_again()
            return self.readinto(buffer)
        if not data and not self._file.tell():
            raise RecordError("archive: truncated", "the compressed file is empty (0 bytes); fetch it again")
        self._given += len(data)
        if self._given > self._most:
            raise RecordError(
                "archive: bomb",
                f"the file unpacks to over {self._most / 1e6:,.0f} MB, more than max_expansion times its size; raise that "
                "if so much is right",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()

    def _open(self) -> None:
        self._file = open_part(self._part)
        try:
            self._stream = self._unpacked(self._file)
        except RecordError:
            self._file.close()
            raise

    def _begin_again(self) -> None:
        self._stream.close()
        self._file.close()
        self._open()
        self._step, at = 1, 0
        while at < self._given:
            if not (data := self._stream.read(min(_STEP, self._given - at))):
                raise RecordError("archive: damaged", "the compressed file was changed while it was read; run again")
            at += len(data)


def _fault(error: Exception) -> RecordError:
    said = " ".join(str(error).split())
    if isinstance(error, EOFError) or "Truncated" in said:
        return RecordError("archive: truncated", "the compressed file stops here, before its end; fetch it again")
    if "requires too much memory" in said or "Memory usage limit" in said:
        message = "unpacking on from here takes a window of over 128 MiB; compress the file again with a smaller one"
        raise RecordError("archive: window too large", message)
    return RecordError("archive: damaged", f"the compressed file is damaged here: {said}; fetch it again")
