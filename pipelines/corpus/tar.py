"""The members of a tar, read one after the other and never extracted.

Enters: an open tar, v7, ustar, GNU or pax. Leaves: its members in their order, and the bytes of those that are asked for.
Always holds: every header's checksum is verified, what is not a plain file is never opened, and one header is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from pipelines.corpus.errors import RecordError

BLOCK = 512
_CHUNK = 2**20
"""Less than this is read rather than jumped over: an object store takes longer to answer than to send it."""
_MOST = 2**43
"""Bytes of a member. Disks hold no such file, and the systems on them refuse to seek so far."""
_MOST_EXTENSION = 2**20
"""Bytes of a header that extends another one; names and attributes do not come near."""

_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"S": "sparse file"} | {
    **dict.fromkeys((b"1", b"2"), "link"),
    **dict.fromkeys((b"3", b"4", b"6"), "device"),
}
_WITHOUT_DATA = frozenset({"folder", "link", "device"})
"""Whatever size their headers state."""


class TarError(RecordError):
    """A tar that cannot be read on; the message names the place."""

    def __init__(self, reason: str, offset: int, error: str) -> None:
        super().__init__(reason, error)
        self.offset = offset
        """Of the header at which reading stopped."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar."""

    name: str
    """Bytes that are not UTF-8 are written `\\xff`."""
    kind: str
    """`file`, or what else it is."""
    begin: int
    """First byte of its header, or of the first header that extends that one."""
    data: int
    """First byte of its content."""
    size: int


@dataclass(slots=True)
class _Extension:
    """What the headers before a member's own say of it."""

    name: bytes = b""
    size: int | None = None
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a tar from which it can be walked as from its beginning."""

    offset: int
    everywhere: _Extension


class Tar:
    """Walks an open tar, once.

    Args:
        file: at byte 0.
        seekable: whether large members that nobody asks for may be jumped over; a decompressing stream must be read.
        jump: what is large: bytes that are read rather than jumped over.
        begin: of a seekable tar, where another walk over it has been.
    """

    def __init__(self, file: BinaryIO, *, seekable: bool, jump: int = _CHUNK, begin: Mark | None = None) -> None:
        self._file = file
        self._jump = jump
        self._seekable = seekable
        self._position = 0
        self._ended_at = 0
        self._begin = begin.offset if begin else 0
        self._everywhere = replace(begin.everywhere) if begin else _Extension()

    def members(self) -> Iterator[Member]:
        """The members up to the mark that ends the tar.

        Raises:
            TarError: it is damaged or cut off; what came before is good.
        """
        offset = begin = self._begin
        everywhere, here = self._everywhere, _Extension()
        while True:
            self._go(offset)
            header = self._read(BLOCK)
            if len(header) < BLOCK:
                what = f"ends before byte {offset + BLOCK}, without the mark that ends a tar; fetch or write it again"
                raise TarError("tar: truncated", offset, what)
            if not any(header):
                self._ended_at = offset
                return
            kind = header[156:157]
            size = _checked_size(header, offset)
            data = offset + BLOCK
            if kind in (b"x", b"X", b"g", b"L", b"K"):
                content = self._extension(offset, data, size)
                if kind == b"L":
                    here.name = content.split(b"\0")[0]
                elif kind != b"K":
                    _read_pax(content, everywhere if kind == b"g" else here, offset)
                offset = data + _padded(size)
                continue
            name = here.name or everywhere.name or _name(header)
            what = _KINDS.get(kind, f"member of type {kind!r}")
            if here.size is not None:
                size = here.size
            if here.sparse or everywhere.sparse:
                what = "sparse file"
            elif what == "file" and name.endswith(b"/"):
                what = "folder"
            if kind == b"S":
                data = self._past_sparse_map(header, data)
            if what in _WITHOUT_DATA:
                size = 0
            if size > _MOST:
                raise _damaged(offset, f"a member of {size} bytes")
            yield Member(name.decode(errors="backslashreplace"), what, begin, data, size)
            offset = begin = data + _padded(size)
            here = _Extension()

    def before(self, member: Member) -> Mark:
        """Of the member that was yielded last: where it can be found again."""
        return Mark(member.begin, replace(self._everywhere))

    def require_end(self) -> None:
        """Once all members are read: nothing follows the mark that ends the tar.

        Raises:
            TarError: something does, as in tars that were concatenated.
        """
        while chunk := self._read(_CHUNK):
            if any(chunk):
                what = f"more follows the mark at byte {self._ended_at} that ends a tar; part what was concatenated"
                raise TarError("tar: more behind its end", self._ended_at, what)

    def content(self, member: Member) -> bytes:
        """All bytes of a member, of the one that was yielded last.

        Raises:
            TarError: the tar is cut off within it.
        """
        self._go(member.data)
        content = self._read(member.size)
        if len(content) < member.size:
            raise _cut_off(member.begin, member.name.encode(), len(content), member.size)
        return content

    def require_whole(self, member: Member) -> None:
        """Without reading it, of a file on disk: all bytes of a member are there.

        Raises:
            TarError: the tar is cut off within it.
        """
        there = os.fstat(self._file.fileno()).st_size - member.data
        if there < member.size:
            raise _cut_off(member.begin, member.name.encode(), there, member.size)

    def _go(self, offset: int) -> None:
        if self._seekable and offset - self._position > self._jump:
            self._position = self._file.seek(offset)
        while self._position < offset and self._read(min(_CHUNK, offset - self._position)):
            pass

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        return data

    def _extension(self, offset: int, data: int, size: int) -> bytes:
        if size > _MOST_EXTENSION:
            raise _damaged(offset, f"a header that extends another one states {size} bytes")
        self._go(data)
        content = self._read(size)
        if len(content) < size:
            raise _cut_off(offset, b"", len(content), size)
        return content

    def _past_sparse_map(self, header: bytes, data: int) -> int:
        more = header[482]
        while more:
            self._go(data)
            more = (self._read(BLOCK) or bytes(BLOCK))[504]
            data += BLOCK
        return data


def _checked_size(header: bytes, offset: int) -> int:
    """The size that a header states, once its checksum proves the header."""
    stated = _number(header[148:156], offset)
    total = sum(header) - sum(header[148:156]) + 8 * 0x20
    # Some old programs summed signed bytes.
    if stated != total and stated != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        what = "no tar header" if offset == 0 else "a header whose checksum is wrong"
        raise _damaged(offset, what)
    return _number(header[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """Octal digits, or binary where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if any(digit not in b"01234567" for digit in digits):
        raise _damaged(offset, "no tar header" if offset == 0 else f"a number that is none: {digits!r}")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _read_pax(content: bytes, extension: _Extension, offset: int) -> None:
    """Records `25 path=some/long/name\n`, the number being the record's length."""
    start, end = 0, len(content.rstrip(b"\0"))
    while start < end:
        digits = content[start : start + 8].split(b" ")[0]
        stop = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = content[start + len(digits) + 1 : stop].partition(b"=")
        if not equals or stop > end or not value.endswith(b"\n"):
            raise _damaged(offset, "an extended header whose records cannot be told apart")
        value = value[:-1]
        if key == b"path":
            extension.name = value
        elif key == b"size":
            extension.size = _decimal(value, offset)
        elif key.startswith(b"GNU.sparse."):
            extension.sparse = True
        start = stop


def _decimal(value: bytes, offset: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise _damaged(offset, f"an extended header whose size is {value[:20]!r}")
    return int(value)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _damaged(offset: int, what: str) -> TarError:
    return TarError("tar: damaged", offset, f"{what} at byte {offset}; fetch or write it again")


def _cut_off(offset: int, name: bytes, there: int, size: int) -> TarError:
    what = f"member {name.decode(errors='backslashreplace')}" if name else "a header"
    return TarError(
        "tar: truncated", offset, f"cut off within {what}: {max(there, 0)} of {size} bytes are there; fetch it again"
    )
