"""Where datasets lie: local folders and object stores behind pyarrow's file systems.

Enters: a path or URI of a user. Leaves: a `Storage` that reads, lists and writes whole files below it. Always holds: a
file is visible under its name only when it is whole.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder on some file system."""

    uri: str
    """As deltalake wants it: an absolute local path, or `s3://...`."""
    filesystem: pafs.FileSystem
    root: str
    """The folder in the file system's own words."""

    @classmethod
    def of(cls, uri: str | Path) -> Storage:
        text = str(uri)
        if "://" in text:
            filesystem, root = pafs.FileSystem.from_uri(text)
            return cls(uri=text.rstrip("/"), filesystem=filesystem, root=root.rstrip("/"))
        absolute = str(Path(text).expanduser().absolute())
        return cls(uri=absolute, filesystem=pafs.LocalFileSystem(), root=absolute)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        """A name below this folder, as the file system wants it."""
        return f"{self.root}/{name}"

    def below(self, name: str) -> Storage:
        return Storage(uri=f"{self.uri}/{name}", filesystem=self.filesystem, root=self.path(name))

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted, without half-written ones; none where it is missing."""
        selector = pafs.FileSelector(self.path(folder) if folder else self.root, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.File and info.base_name[0] != ".")

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; on a local disk through a temporary name, fsynced and renamed."""
        if not self.is_local:
            with self.filesystem.open_output_stream(self.path(name)) as stream:
                stream.write(data)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        temporary.write_bytes(data)
        sync(temporary)
        temporary.replace(target)


def sync(path: Path) -> None:
    """Force a written file onto the disk, so that a commit never names bytes that a power cut can take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
