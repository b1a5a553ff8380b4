"""What must be known of a sound file beyond what its decoder says: where its streams begin, and how long it is.

Enters: the bytes of a WAV, FLAC, OGG or MP3 file. Leaves: the streams in it, each a file that libsndfile reads whole.
Always holds: nothing is left out. libsndfile alone stops after the first of several OGG streams, takes the length of an MP3
file from an estimate or from the first of several files put together, and decodes what is left of a file that was cut off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipelines.corpus.errors import MediaError


def streams(data: bytes, uri: str) -> list[bytes]:
    """The streams of a file, one after another; nearly every file is a single one.

    Raises:
        MediaError: the file was cut off, or is put together of parts that do not fit.
    """
    if data.startswith(b"OggS"):
        return _ogg_streams(data, uri)
    if data.startswith(b"RIFF") and len(data) >= 8:
        announced = int.from_bytes(data[4:8], "little") + 8
        # Programs that write to a pipe cannot know the size, and announce the largest instead.
        if len(data) < announced < 0x7FFF_0000:
            raise _truncated(uri, f"{len(data)} of {announced} bytes are there")
    elif data.startswith(b"ID3") or _frame(data, 0):
        start = _next_frame(data, _after_tags(data, 0))
        return [data if start is None else _with_length(data, start, uri)]
    return [data]


def _truncated(uri: str, what: str) -> MediaError:
    return MediaError(f"{uri}: truncated, {what}. Fetch it again.", "truncated")


# OGG (RFC 3533): pages of a header of 27 bytes, a table of segment lengths, and the segments.

_BEGINS, _ENDS = 2, 4


def _ogg_streams(data: bytes, uri: str) -> list[bytes]:
    """Files put together one after another (RFC 3533 calls them chained), each with its own header and maybe rate."""
    starts: list[int] = []
    at, flags = 0, 0
    while data.startswith(b"OggS", at):
        table = data[at + 27 : at + 27 + data[at + 26]] if len(data) >= at + 27 else b""
        size = 27 + len(table) + sum(table)
        if len(data) < at + 27 or len(table) < data[at + 26] or len(data) < at + size:
            raise _truncated(uri, "its last page is not complete")
        # Streams that lie side by side begin side by side; one that begins later comes after them.
        if data[at + 5] & _BEGINS and not flags & _BEGINS:
            starts.append(at)
        at, flags = at + size, data[at + 5]
    if data.find(b"OggS", at) >= 0:
        raise MediaError(f"{uri}: no page where one should be, at byte {at}. Fetch it again.", "damaged")
    if not flags & _ENDS:
        raise _truncated(uri, "its last page does not end the stream")
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]


# MP3 (ISO 11172-3 and 13818-3, layer III): frames of a header of 4 bytes, without a word on how many there are. The Xing
# or Info tag, which encoders put into a first frame of silence, says so.

_KBPS = {
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""By the header's version bits: MPEG 1, 2 and 2.5."""


_LIKE_A_HEADER = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef]", re.DOTALL)
"""Where a frame's header may be. Asked of every byte, a file of 256 MB of junk took ten minutes."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """Header of an MP3 frame."""

    version: int
    rate_hz: int
    mono: bool
    size: int
    """Bytes, the header's four among them."""

    @property
    def kind(self) -> tuple[int, int]:
        """What all frames of a file share."""
        return self.version, self.rate_hz

    @property
    def tag_at(self) -> int:
        """Where a Xing or Info tag would lie: behind the header and the side information."""
        if self.version == 3:
            return 4 + (17 if self.mono else 32)
        return 4 + (9 if self.mono else 17)


def _frame(data: bytes, at: int) -> _Frame | None:
    """The frame at a place, if there is one."""
    if len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or not 1 <= bitrate <= 14 or rate == 3:
        return None
    rate_hz = _RATES_HZ[version][rate]
    padding = data[at + 2] >> 1 & 1
    kbps = _KBPS[3 if version == 3 else 2][bitrate - 1]
    size = (144_000 if version == 3 else 72_000) * kbps // rate_hz + padding
    return _Frame(version, rate_hz, data[at + 3] >> 6 == 3, size)


def _after_tags(data: bytes, at: int) -> int:
    """The first byte behind ID3v2 tags, which say their own size in four digits of base 128."""
    while data.startswith(b"ID3", at) and len(data) >= at + 10:
        size = 0
        for digit in data[at + 6 : at + 10]:
            size = size << 7 | digit & 0x7F
        # The flag of a footer as long as the header.
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
    return at


def _next_frame(data: bytes, at: int, like: _Frame | None = None) -> int | None:
    """The first frame from a place on. Junk may hold what looks like a header; two of one kind in a row it will not."""
    while at >= 0:
        frame = _frame(data, at)
        if frame and (like is None or frame.kind == like.kind):
            following = _frame(data, at + frame.size)
            if at + frame.size == len(data) or (following and following.kind == frame.kind):
                return at
        found = _LIKE_A_HEADER.search(data, at + 1)
        at = found.start() if found else -1
    return None


def _count(data: bytes, at: int | None, uri: str) -> int:
    """How many frames there are, with tags and junk between them."""
    first, count = None, 0
    while at is not None:
        frame = _frame(data, at)
        first = first or frame
        if frame and first and frame.kind == first.kind:
            count += 1
            at += frame.size
        elif first and frame and _next_frame(data, at, frame) == at:
            message = (
                f"{uri}: changes from {first.rate_hz} Hz to {frame.rate_hz} Hz at byte {at}. Convert it to one rate."
            )
            raise MediaError(message, "sample rate")
        else:
            # On from where a tag ends, or over what only looked like a frame.
            after = _after_tags(data, at)
            at = _next_frame(data, after if after > at else at + 1, first)
    return count


def _with_length(data: bytes, start: int, uri: str) -> bytes:
    """An MP3 file from its first frame on, which says how many follow: a new one, if that which is there does not."""
    first = _frame(data, start)
    assert first is not None
    header = bytearray(data[start : start + 4])
    tag = data[start + first.tag_at : start + first.size]
    tagged = tag[:4] in (b"Xing", b"Info")
    sound = start + (first.size if tagged else 0)
    count = _count(data, sound, uri)
    # Some encoders count the first frame too. Fewer than announced is for the decoder to find: the file was cut off.
    if tagged and tag[7] & 1 and count <= int.from_bytes(tag[8:12], "big") + 1:
        return data[start:]
    # No checksum; a bitrate (of 128 or 80 kbit/s) at which the tag fits into the frame; no padding.
    header[1] |= 1
    header[2] = 9 << 4 | header[2] & 0x0D
    frame = _frame(bytes(header), 0)
    assert frame is not None
    said = bytes(header) + bytes(frame.tag_at - 4) + b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return said + bytes(frame.size - len(said)) + data[sound:]
