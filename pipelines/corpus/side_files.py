"""Files that records name: the pictures and sounds that lie below a folder, beside the table that lists them.

Enters: a folder's part, and a name as a record has it. Leaves: the file's part, for `open_part`. Always holds: a name
that leads out of the folder is refused.
"""

from __future__ import annotations

import posixpath
from urllib.parse import quote

from pipelines.corpus.errors import RecordError
from pipelines.corpus.files import File, located


def folder_part(path: str) -> str:
    """The part of a folder that a recipe names."""
    return File("", located(path)).part


def parent(part: str, levels: int = 1) -> str:
    """The part of the folder that a file or folder lies in."""
    for _ in range(levels):
        part = posixpath.dirname(part)
    return part


def below(folder: str, name: str) -> str:
    """The part of a file below a folder.

    Raises:
        RecordError: the name is empty, absolute, or leads out of the folder.
    """
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        message = f"{name!r} is no name of a file below {folder}; name files relative to that folder"
        raise RecordError("file: unsafe name", message)
    return f"{folder}/{quote(name) if folder.startswith('file://') else name}"
