"""Which files are text, pictures and sounds, by their endings; and reading one of them whole, within a limit."""

from __future__ import annotations

import posixpath

from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import open_part
from pipelines.sequence import Modality

EXTENSIONS = {
    Modality.TEXT: ("txt", "text", "caption"),
    Modality.IMAGE: ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    Modality.AUDIO: ("wav", "flac", "ogg", "opus", "mp3"),
}
"""Upper or lower case; other files are left alone, whatever they hold."""

MODALITIES = {f".{extension}": modality for modality, extensions in EXTENSIONS.items() for extension in extensions}
"""By ending, lower case."""


def ending(name: str) -> str:
    """From the last dot of a file's name, lower case."""
    return posixpath.splitext(name)[1].lower()


def endings(*modalities: Modality) -> tuple[str, ...]:
    """The endings of files of these modalities."""
    return tuple(f".{extension}" for modality in modalities for extension in EXTENSIONS[modality])


def read_file(part: str, most_mb: float, setting: str = "max_file_mb") -> bytes:
    """All bytes of a file.

    Raises:
        RecordError: it cannot be read, or holds more than `most_mb`.
    """
    try:
        with open_part(part) as file:
            data = file.read(int(most_mb * 1e6) + 1)
    except OSError as error:
        # Object stores' errors have no number, and so no `strerror`.
        why = error.strerror or str(error)
        raise RecordError("file: unreadable", f"{part}: cannot be read: {why}; restore or remove it") from error
    if len(data) > most_mb * 1e6:
        raise RecordError("file: too large", f"{part}: over {setting} = {most_mb:g}; split it or raise that limit")
    return data


def decoded(data: bytes, place: str) -> str:
    """The text of a file, without a byte order mark and the white space around it.

    Raises:
        RecordError: it is not UTF-8.
    """
    try:
        return data.decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        message = f"{place}: not UTF-8 at byte {error.start}; save it as UTF-8"
        raise RecordError("text: not UTF-8", message) from error
