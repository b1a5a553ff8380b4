"""Pictures, sounds and texts that are damaged, hostile or merely odd, each with what shall become of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.pipelines.test_pictures import COLOURS, _png_that_claims
from tests.pipelines.test_pictures import _file as picture_file
from tests.pipelines.test_sound_files import clip, encoded, mp3

RATE = 8000
"""Of the tiny audio tokenizer: sounds at this rate are not resampled."""

GOOD = "the quick fox"
"""A text that stands beside each kind, and must be read whatever lies there."""

Files = Mapping[str, bytes | str]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of input. Either it has a reason, and is quarantined for it; or it is read, and says as what."""

    files: Files
    """Below the source's folder."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"reader": "media_folder"})
    make: Callable[[Path], object] = lambda folder: None
    """Makes what is no plain file."""
    reason: str = ""
    says: str = ""
    """Part of the message."""
    like: Files | None = None
    """A folder of plain files that gives the same rows."""
    texts: tuple[str, ...] = (GOOD,)
    """All texts that are read, but for those of `like`."""


def refused(name: str, content: bytes | str, reason: str, says: str = "", **more: Any) -> Kind:
    return Kind(files={name: content, "good.txt": GOOD}, reason=reason, says=says, **more)


def read_as(name: str, content: bytes | str, plain_name: str, plain: bytes) -> Kind:
    return Kind(files={name: content, "good.txt": GOOD}, like={plain_name: plain, "good.txt": GOOD})


def picture(image: Image.Image, kind: str = "PNG", *, plain: Any, name: str = "x.png", **how: Any) -> Kind:
    """A picture that reads like the pixels in `plain`."""
    return read_as(name, picture_file(image, kind, **how), "x.png", picture_file(Image.fromarray(plain)))


def sound(data: bytes, *, plain: Any, name: str = "x.wav") -> Kind:
    """A sound that reads like the samples in `plain`."""
    return read_as(name, data, "x.wav", encoded(np.asarray(plain, np.float32), "WAV", "FLOAT", RATE))


def flat(*colour: int) -> np.ndarray:
    return np.full((9, 14, len(colour)), colour, np.uint8)


def chunk_of_png(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(chunk: bytes) -> bytes:
    """A good picture with one more chunk behind its header."""
    data = picture_file(Image.fromarray(COLOURS))
    return data[:33] + chunk + data[33:]


def icon_that_claims(side: int) -> bytes:
    """An icon of one picture whose own header states any size."""
    inner = _png_that_claims(side, side)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner


def wav_header(rate: int, channels: int = 1) -> bytes:
    data = bytearray(encoded(np.zeros((800, channels), np.int16), "WAV", "PCM_16", RATE))
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


def _pictures() -> dict[str, Kind]:
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.new("P", (14, 9), 1)
    palette.putpalette([9, 9, 9, 200, 30, 60])
    red, lime = (Image.fromarray(flat(*c)) for c in ((255, 0, 0), (0, 255, 0)))
    wide = np.tile(COLOURS[:1], (1, 300, 1))
    deep = np.arange(126, dtype=np.uint16).reshape(9, 14) * 500
    eight = np.round(deep / 257).astype(np.uint8)
    png, jpeg = picture_file(Image.fromarray(COLOURS)), picture_file(Image.fromarray(COLOURS), "JPEG")
    alpha = np.dstack([COLOURS, np.zeros((9, 14), np.uint8)])
    lab = Image.fromarray(COLOURS, "LAB")
    return {
        "picture-of-0-bytes": refused("x.png", b"", "image: empty file"),
        "picture-truncated-png": refused("x.png", png[: len(png) * 2 // 3], "image: damaged"),
        "picture-truncated-jpeg": refused("x.jpg", jpeg[: len(jpeg) * 2 // 3], "image: damaged", "truncated"),
        "picture-that-is-text": refused("x.png", "no picture", "image: unknown format", "10 bytes in no known"),
        "picture-that-is-postscript": refused("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "image: unknown format"),
        "picture-that-is-svg": refused("x.png", "<svg width='9' height='9'/>", "image: unknown format"),
        "picture-bomb": refused("x.png", _png_that_claims(60_000, 60_000), "image: too many pixels", "3600000000"),
        "picture-bomb-in-an-icon": refused("x.png", icon_that_claims(20_000), "image: too many pixels"),
        "picture-with-a-text-bomb": refused(
            "x.png", png_with(chunk_of_png(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))), "image: damaged"
        ),
        "picture-of-integers": refused(
            "x.tif", picture_file(Image.fromarray(np.full((4, 5), 70_000, np.int32)), "TIFF"), "image: unknown range"
        ),
        "picture-in-lab": refused("x.tif", picture_file(lab, "TIFF"), "image: unknown colours", "mode LAB"),
        "picture-over-max-file-mb": refused(
            "x.png", png, "file: too large", "max_file_mb", settings={"reader": "media_folder", "max_file_mb": 0.0002}
        ),
        "picture-link-to-nowhere": refused(
            "y.txt",
            GOOD,
            "file: unreadable",
            "x.png: cannot be read: No such file",
            texts=(GOOD, GOOD),
            make=lambda folder: (folder / "x.png").symlink_to("gone"),
        ),
        "picture-under-another-ending": picture(red, "PNG", plain=flat(255, 0, 0), name="x.jpg"),
        "picture-cmyk": picture(
            Image.fromarray(flat(0, 255, 255, 0), "CMYK"), "TIFF", plain=flat(255, 0, 0), name="x.tif"
        ),
        "picture-16-bit": picture(Image.fromarray(deep), plain=np.repeat(eight[..., None], 3, 2)),
        "picture-animated-gif": picture(
            red, "GIF", plain=flat(255, 0, 0), name="x.gif", save_all=True, append_images=[lime]
        ),
        "picture-animated-webp": picture(
            red, "WEBP", plain=flat(255, 0, 0), name="x.webp", save_all=True, append_images=[lime], lossless=True
        ),
        "picture-turned-by-exif": picture(
            Image.fromarray(np.ascontiguousarray(np.rot90(COLOURS, 1))), plain=COLOURS, exif=exif
        ),
        "picture-of-a-palette": picture(palette, plain=flat(200, 30, 60)),
        "picture-of-a-transparent-palette": picture(palette, plain=flat(255, 255, 255), transparency=1),
        "picture-that-is-transparent": picture(Image.fromarray(alpha), plain=flat(255, 255, 255)),
        "picture-of-one-bit": picture(Image.new("1", (14, 9), 1), plain=flat(255, 255, 255)),
        "picture-with-a-broken-profile": picture(Image.fromarray(COLOURS), plain=COLOURS, icc_profile=b"no profile"),
        "picture-with-broken-exif": picture(
            Image.fromarray(COLOURS), plain=COLOURS, exif=b"Exif\0\0II\x2a\0\xff\xff\xff\x7f"
        ),
        "picture-of-4200-by-1": picture(Image.fromarray(wide), "BMP", plain=wide, name="x.bmp"),
        "picture-with-more-behind-it": read_as("x.png", png + b"PK\x03\x04" * 9, "x.png", png),
    }


def _sounds() -> dict[str, Kind]:
    one = clip(0.3, 1, RATE)
    eight = np.stack([clip(0.3, seed, RATE) for seed in range(8)], axis=1)
    nan = one.copy()
    nan[7] = np.nan
    wav, ogg = encoded(one, "WAV", "PCM_16", RATE), encoded(clip(9, 1, RATE), "OGG", "VORBIS", RATE)
    holed = bytearray(ogg)
    second = ogg.find(b"OggS", ogg.find(b"OggS", 1000) + 1)
    holed[second : second + 4] = b"????"
    flac = encoded(one, "FLAC", "PCM_16", RATE)
    hour = encoded(np.zeros(3600 * RATE, np.int16), "FLAC", "PCM_16", RATE)
    piped = bytearray(wav)
    piped[4:8] = (0x7FFF_F024).to_bytes(4, "little")
    whole = np.round(one * 2**15) / 2**15
    quarter = np.round(one * 2**7) / 2**7
    return {
        "sound-of-0-bytes": refused("x.wav", b"", "audio: empty file"),
        "sound-of-0-samples": refused("x.wav", encoded(one[:0], "WAV", "PCM_16", RATE), "audio: no samples"),
        "sound-shorter-than-a-sample": refused("x.wav", encoded(one[:1], "WAV", "PCM_16", 192_000), "audio: empty"),
        "sound-of-nan": refused("x.wav", encoded(nan, "WAV", "FLOAT", RATE), "audio: not finite"),
        "sound-of-17-channels": refused("x.wav", wav_header(RATE, 17), "audio: too many channels", "17 channels"),
        "sound-at-1-hz": refused("x.wav", wav_header(1), "audio: sample rate", "1 Hz by its header"),
        "sound-at-2-ghz": refused("x.wav", wav_header(2**31 - 1), "audio: sample rate"),
        "sound-that-changes-its-rate": refused(
            "x.mp3", mp3(clip(1, 1)) + mp3(clip(1, 1, 44_100), 44_100), "audio: sample rate", "to 44100 Hz"
        ),
        "sound-bomb": refused("x.flac", hour, "audio: too long", "3600.0 s by its header"),
        "sound-truncated-wav": refused("x.wav", wav[:-99], "audio: truncated"),
        "sound-truncated-ogg": refused("x.ogg", ogg[:-99], "audio: truncated"),
        "sound-truncated-mp3": refused("x.mp3", mp3(clip(3, 1))[:-20], "audio: truncated"),
        "sound-truncated-flac": refused("x.flac", flac[:-99], "audio: damaged", "lost sync"),
        "sound-with-a-page-lost": refused("x.ogg", bytes(holed), "audio: damaged", "no page where one should be"),
        "sound-that-is-text": refused("x.mp3", "no sound", "audio: unknown format"),
        "sound-that-is-aiff": refused("x.wav", encoded(one, "AIFF", "PCM_16", RATE), "audio: unknown format", "AIFF"),
        "sound-that-is-a-picture": refused("x.wav", picture_file(Image.fromarray(COLOURS)), "audio: unknown format"),
        "sound-of-8-channels": sound(encoded(eight, "WAV", "FLOAT", RATE), plain=eight.mean(axis=1, dtype=np.float32)),
        "sound-of-16-bits": sound(wav, plain=whole),
        "sound-of-8-bits": sound(encoded(quarter, "WAV", "PCM_U8", RATE), plain=quarter),
        "sound-under-another-ending": sound(flac, plain=whole, name="x.mp3"),
        "sound-written-to-a-pipe": sound(bytes(piped), plain=whole),
        "sound-with-more-behind-it": sound(wav + b"LIST\x04\0\0\0junk", plain=whole),
    }


def _texts() -> dict[str, Kind]:
    deep = '{"caption": ' + "[" * 200_000
    special = "a <|end|> b <|image|> <s> </s> [INST]"
    return {
        "text-latin-1": refused("x.txt", b"caf\xe9", "text: not UTF-8", "at byte 3"),
        "text-utf-16": refused("x.txt", "fox".encode("utf-16"), "text: not UTF-8", "at byte 0"),
        "text-of-0-bytes": refused("x.txt", b"", "document: empty"),
        "text-of-white-space": refused("x.txt", " \n\t\u2003", "document: empty"),
        "text-of-nothing-to-see": refused("x.txt", "\u200b", "text: empty", "makes no piece"),
        "text-too-long": refused("x.txt", "fox " * 9000, "text: too long", "35,999 characters"),
        "text-in-json-too-deep": refused(
            "x.json", deep, "json: not valid", settings={"reader": "media_folder", "json_field": "caption"}
        ),
        "text-with-a-byte-order-mark": Kind(files={"x.txt": b"\xef\xbb\xbfa fox"}, texts=("a fox",)),
        "text-like-special-tokens": Kind(files={"x.txt": special}, texts=(special,)),
        "text-under-a-name-that-is-no-text": Kind(
            files={}, make=lambda folder: Path(f"{folder}/caf\udce9.txt").write_text("a fox"), texts=("a fox",)
        ),
        "text-under-a-name-of-many-signs": Kind(files={"a b#%20\n'\"*?é.txt": "a fox"}, texts=("a fox",)),
    }


MEDIA = _pictures() | _sounds() | _texts()
