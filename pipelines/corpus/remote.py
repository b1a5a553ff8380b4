"""Object stores: `s3://bucket/key` and `gs://bucket/key`, reached as AWS's and Google's own tools reach them.

Enters: URIs, taken as they stand: a key is not percent-encoded. Leaves: listings and open files. Always holds: what may
pass is tried again a bounded number of times and then raised as `TransientError`; every request has a timeout; and no
read gives fewer bytes than there are, or others.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import pyarrow.fs as pafs

from pipelines.corpus.errors import StoreError, TransientError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEMES = ("s3://", "gs://")

NO_BUCKET = "no such bucket"

TRIES = 8
GIVE_UP_S = 120.0
"""An operation is begun at most so often, and not again after so long. Each may be several requests, and the store's own
library repeats a failed one by itself."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0

_FIRST_WINDOW, _LARGEST_WINDOW = 2**18, 2**23
"""Bytes read ahead: twice as many with each window that continues the last one."""

# All that the libraries give is text: pyarrow's of S3 and of Google, deltalake's.
_NOT_THERE = re.compile(
    r"AWS Error (NO_SUCH_KEY|NO_SUCH_BUCKET|RESOURCE_NOT_FOUND)|\(HTTP status 404\)|Status\(NOT_FOUND|code 404 Not Found"
)
_REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_OBJECT_STATE|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH)|\(HTTP status 403\)"
    r"|Status\((PERMISSION_DENIED|UNAUTHENTICATED)|code 403 Forbidden"
)
_NO_BUCKET = re.compile(r"AWS Error NO_SUCH_BUCKET|<Code>NoSuchBucket")

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether a path names an object store.

    Raises:
        StoreError: it names some other place that is no local path.
    """
    if path.startswith(SCHEMES):
        return True
    scheme, mark, _ = path.partition("://")
    if mark and scheme.isalnum() and scheme != "file":
        raise StoreError(f"{path}: {scheme}:// is not known; name a local path, s3://BUCKET/... or gs://BUCKET/...")
    return False


def endpoint() -> str | None:
    """The S3 service to ask, where it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def region(bucket: str) -> str:
    """The region of a bucket: as the environment says, or else as Amazon does."""
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or ("us-east-1" if endpoint() else _looked_up(bucket))


def anonymous() -> bool:
    """Whether to ask without credentials, as public buckets allow."""
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes")


def attempts() -> int:
    """How often the store's library sends one request."""
    return int(os.environ.get("AWS_MAX_ATTEMPTS", "3"))


def timeout_s() -> float:
    """How long a connection may stay silent."""
    return float(os.environ.get("BRAID_STORE_TIMEOUT_S", "30"))


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the URI in its words."""
    path = uri.partition("://")[2]
    return (_s3(path.partition("/")[0]) if uri.startswith("s3://") else _gs()), path


@functools.cache
def _s3(bucket: str) -> pafs.FileSystem:
    service = endpoint()
    scheme, _, host = (service or "https://").partition("://")
    return pafs.S3FileSystem(
        region=region(bucket),
        scheme=scheme,
        endpoint_override=host.rstrip("/") or None,
        anonymous=anonymous(),
        request_timeout=timeout_s(),
        connect_timeout=min(timeout_s(), 10.0),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts()),
        # Small files become one PUT in place of the three requests of an upload in parts.
        allow_delayed_open=True,
    )


@functools.cache
def _gs() -> pafs.FileSystem:
    return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=timeout_s()))


@functools.cache
def _looked_up(bucket: str) -> str:
    return retried(f"s3://{bucket}", lambda: str(pafs.resolve_s3_region(bucket)))


def retried(what: str, attempt: Callable[[], T]) -> T:
    """Do something with an object store, again after a pause if it fails in a way that may pass.

    Args:
        what: names the place in errors.

    Raises:
        FileNotFoundError: there is no such object or bucket.
        PermissionError: the store refuses.
        TransientError: it failed again and again.
    """
    began = time.monotonic()
    for number in range(TRIES):
        try:
            return attempt()
        except OSError as error:
            if refusal := _refusal(what, error):
                raise refusal from error
            if number == TRIES - 1 or time.monotonic() - began > GIVE_UP_S:
                raise TransientError(
                    f"{what}: failed {number + 1} times within {time.monotonic() - began:.0f} s, last with: {_line(error)}; "
                    "nothing is wrong with the data. Look whether the store can be reached, and run the same command again"
                ) from error
        # Half of it by chance, so that workers that failed together do not come back together.
        time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number) * random.uniform(0.5, 1.0))
    raise AssertionError


def _refusal(what: str, error: Exception) -> OSError | None:
    """An error that will not pass as what the operating system would raise; None for one that may pass."""
    text = _line(error)
    if isinstance(error, FileNotFoundError) or _NOT_THERE.search(text):
        reason = NO_BUCKET if _NO_BUCKET.search(text) else "no such object"
        return FileNotFoundError(errno.ENOENT, reason, what)
    if isinstance(error, PermissionError) or _REFUSED.search(text):
        return PermissionError(errno.EACCES, f"the store refuses ({text})", what)
    return None


def _line(error: Exception) -> str:
    """The whole message on one line, without the arrows and colours that deltalake draws."""
    return " ".join(re.sub(r"\x1b\[\d+m|↳", "", str(error)).split())


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as its store lists it."""

    path: str
    """Relative to what was listed."""
    stamp: tuple[int, str]
    """Bytes, and what changes with size or modification time. S3 tells times to the second, and pyarrow no etags: of two
    writes of equal size within one second, with a listing between them, the second is not seen."""


def kind(uri: str) -> tuple[str | None, tuple[int, str] | None]:
    """What lies at a URI: `file` with its stamp, `folder`, or None."""
    filesystem, path = file_system(uri)
    info = retried(uri, lambda: filesystem.get_file_info(path))
    if info.type == pafs.FileType.File:
        return "file", _stamp(info)
    return ("folder" if info.type == pafs.FileType.Directory else None), None


def listing(uri: str) -> list[Stored]:
    """All objects below a URI, in the store's order: a thousand a request, and no request for each."""
    filesystem, path = file_system(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = retried(uri, lambda: filesystem.get_file_info(selector))
    return [Stored(i.path.removeprefix(f"{path}/"), _stamp(i)) for i in infos if i.type == pafs.FileType.File]


def _stamp(info: pafs.FileInfo) -> tuple[int, str]:
    return info.size, f"{info.size} {info.mtime_ns}"


class RemoteFile(io.RawIOBase):
    """An object, open for reading anywhere in it, in windows that grow as long as one follows the other."""

    def __init__(self, uri: str) -> None:
        """
        Raises:
            FileNotFoundError, PermissionError, TransientError: reads may raise them too.
        """
        self._uri = uri
        filesystem, path = file_system(uri)
        self._source = retried(uri, lambda: filesystem.open_input_file(path))
        self._size = int(self._source.size())
        self._position = 0
        self._window = bytearray()
        self._window_at = 0
        self._ahead = _FIRST_WINDOW // 2

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._uri)
        self._position = position
        return position

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            self._window = bytearray()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        left = max(self._size - self._position, 0)
        view = memoryview(buffer).cast("B")[:left]
        if not len(view):
            return 0
        at = self._position - self._window_at
        if not 0 <= at < len(self._window):
            follows = at == len(self._window)
            self._ahead = min(2 * self._ahead, _LARGEST_WINDOW) if follows else _FIRST_WINDOW
            self._window = bytearray(min(self._ahead, left) if len(view) < self._ahead else 0)
            self._window_at, at = self._position, 0
            if not self._window:
                # As much as a window is asked for: no need of one.
                retried(self._uri, lambda: self._fetch(self._position, view))
                self._position = self._window_at = self._position + len(view)
                return len(view)
            retried(self._uri, lambda: self._fetch(self._position, memoryview(self._window)))
        count = min(len(view), len(self._window) - at)
        view[:count] = memoryview(self._window)[at : at + count]
        self._position += count
        return count

    def _fetch(self, position: int, view: memoryview) -> None:
        """Fill a buffer with the bytes at a position.

        pyarrow reports as many bytes as it asked S3 for, whatever came: of an object that was replaced by a shorter one
        the rest of the buffer stays as it was, which a mark in the last byte shows.
        """
        mark = 0xA5
        view[-1] = mark
        self._source.seek(position)
        whole = self._source.readinto(view) == len(view)
        if whole and view[-1] == mark:
            # It may be the true byte: that one alone over another mark.
            last = bytearray([mark ^ 0xFF])
            self._source.seek(position + len(view) - 1)
            whole = self._source.readinto(last) == 1 and last[0] == mark
        if not whole:
            raise OSError(
                errno.EIO, f"shorter than the {self._size} bytes it had; was it replaced just now?", self._uri
            )
