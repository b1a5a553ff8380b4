"""Where datasets lie: local folders and object stores, behind pyarrow's file systems and deltalake's own.

Enters: a path or URI of a user. Leaves: a `Storage` that reads, lists and writes whole files below it. Always holds: a
file is visible under its name only when it is whole; both libraries reach a store with the same settings; and what may
pass, such as a store that asks to slow down, is tried again a bounded number of times.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.corpus import remote
from pipelines.corpus.errors import StoreError

T = TypeVar("T")


class DiskFullError(RuntimeError):
    """A disk that is written to is full. What is committed stays, and the same command goes on from there."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder on some file system."""

    uri: str
    """As deltalake wants it: an absolute local path, `s3://...` or `gs://...`."""
    filesystem: pafs.FileSystem
    root: str
    """The folder in the file system's own words."""

    @classmethod
    def of(cls, uri: str | Path) -> Storage:
        text = str(uri)
        if remote.is_remote(text):
            filesystem, root = remote.file_system(text.rstrip("/"))
            return cls(uri=text.rstrip("/"), filesystem=filesystem, root=root)
        absolute = str(Path(text.removeprefix("file://")).expanduser().absolute())
        return cls(uri=absolute, filesystem=pafs.LocalFileSystem(), root=absolute)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def delta_options(self) -> dict[str, str]:
        """The `storage_options` of every Delta table here. Credentials deltalake finds by itself, as pyarrow does."""
        if self.is_local:
            return {}
        options = {
            "timeout": f"{remote.timeout_s():g}s",
            "connect_timeout": f"{min(remote.timeout_s(), 10.0):g}s",
            # Opening a table is up to a hundred requests, which one that fails brings down together.
            "max_retries": "8",
            "retry_timeout": "60s",
            "backoff_config.max_backoff": "2s",
        }
        if self.uri.startswith("s3://"):
            service = remote.endpoint()
            options |= {
                "aws_region": remote.region(self.root.partition("/")[0]),
                # A commit is a PUT on the condition that nothing lies there yet: see docs/storage.md.
                "aws_conditional_put": "etag",
                "aws_skip_signature": str(remote.anonymous()).lower(),
            }
            if service:
                options |= {"aws_endpoint": service, "allow_http": str(service.startswith("http://")).lower()}
        return options

    def path(self, name: str) -> str:
        """A name below this folder, as the file system wants it."""
        return f"{self.root}/{name}" if name else self.root

    def below(self, name: str) -> Storage:
        return Storage(uri=f"{self.uri}/{name}", filesystem=self.filesystem, root=self.path(name))

    def tried(self, attempt: Callable[[], T]) -> T:
        """Do something here, again if it fails in a way that may pass.

        Raises:
            TransientError: it failed again and again.
            StoreError: there is no such bucket, or no access to it.
            DiskFullError: the message names the disk.
            FileNotFoundError: an object is missing.
        """
        if self.is_local:
            with naming_a_full_disk(Path(self.root)):
                return attempt()
        try:
            return remote.retried(self.uri, attempt)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and error.strerror != remote.NO_BUCKET:
                raise
            raise StoreError(f"{self.uri}: {error.strerror}; see docs/storage.md for how access is set up") from error

    def info(self, names: Collection[str]) -> list[pafs.FileInfo]:
        """Type, size and times of some files, in their order."""
        return list(self.tried(lambda: self.filesystem.get_file_info([self.path(name) for name in names])))

    def listed(self, folder: str = "") -> list[pafs.FileInfo]:
        """The files directly in a folder, half-written ones too; none where it is missing."""
        return [info for info in self._entries(folder) if info.type == pafs.FileType.File]

    def exists(self, name: str) -> bool:
        return bool(self.info([name])[0].type != pafs.FileType.NotFound)

    def names(self, folder: str = "") -> list[str]:
        """Names of the files directly in a folder, sorted, without half-written ones; none where it is missing."""
        return sorted(info.base_name for info in self.listed(folder) if info.base_name[0] != ".")

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading from any place in it."""
        if self.is_local:
            return self.filesystem.open_input_file(self.path(name))
        return pa.PythonFile(self.tried(lambda: remote.RemoteFile(f"{self.uri}/{name}")), mode="r")

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; on a local disk through a temporary name, fsynced and renamed."""
        if not self.is_local:
            self.tried(lambda: self._put(name, data))
            return
        _whole(Path(self.path(name)), lambda temporary: temporary.write_bytes(data))

    def upload(self, source: Path, name: str) -> None:
        """Move a finished local file here; on a local disk from the same one."""
        if self.is_local:
            source.replace(self.path(name))
            return
        self.tried(lambda: self._copy(source, name))
        source.unlink()

    def put(self, source: Path, name: str) -> None:
        """Copy a finished local file here; whole under its name or not there."""
        if not self.is_local:
            self.tried(lambda: self._copy(source, name))
            return
        _whole(Path(self.path(name)), lambda temporary: shutil.copyfile(source, temporary))

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted; none where it is missing."""
        return sorted(info.base_name for info in self._entries("") if info.type == pafs.FileType.Directory)

    def delete_folder(self) -> None:
        """Remove this folder with all that is in it, if it is there."""

        def attempt() -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_dir(self.root)

        self.tried(attempt)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

        def attempt() -> None:
            # Missing where another job was quicker, or an earlier attempt whose answer was lost.
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(self.path(name))

        self.tried(attempt)

    def _entries(self, folder: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return list(self.tried(lambda: self.filesystem.get_file_info(selector)))

    def _copy(self, source: Path, name: str) -> None:
        # Not by `pyarrow.fs.copy_files`: it leaves closing to a destructor, which hides a failed upload and then sends an
        # empty one that nobody waits for, and that may empty what the next attempt has written.
        with pa.memory_map(str(source)) as file:
            self._put(name, file.read_buffer())

    def _put(self, name: str, data: bytes | pa.Buffer) -> None:
        path, size = self.path(name), len(data)
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)
        there = self.filesystem.get_file_info(path).size
        if there != size:
            raise OSError(errno.EIO, f"{size} bytes were written, but {there} are there", path)


def _whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let a local file appear under its name when all of it is on the disk, or not at all."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with naming_a_full_disk(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            sync(temporary)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn "no space left" into a `DiskFullError` that names the disk of a folder and the remedy."""
    try:
        yield
    except OSError as error:
        # deltalake's errors have no number, only its text.
        if error.errno not in _FULL and not any(f"(os error {number})" in str(error) for number in _FULL):
            raise
        raise DiskFullError(_full_disk(folder)) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _full_disk(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    disk = folder
    while not disk.is_mount():
        disk = disk.parent
    usage = shutil.disk_usage(disk)
    return (
        f"{folder}: the disk is full ({disk}: {usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB free, or a quota is "
        "reached). Free space there or enlarge it, and run the same command again: it goes on from what is committed"
    )


def sync(path: Path) -> None:
    """Force a written file onto the disk, so that a commit never names bytes that a power cut can take."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
