"""`braid tokenizer fetch`: a released file comes to this machine, and is what it should be.

Enters: an address (http, https, file) or a known name, and the sha256 that the file must have. Leaves: the file in a folder.
Always holds: a file has its name only once its sha256 was checked; until then it is `NAME.part`, from which a later call
goes on if the server can send ranges. What may pass (a broken connection, a silent or busy server) is tried again, a bounded
number of times; what will not (no such file, no permission) ends at once.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A released file whose address is public."""

    url: str
    sha256: str
    """As far as it is known: the publisher put the first eight digits into the file's name."""


_ENCODEC = "https://dl.fbaipublicfiles.com/encodec/v0"
KNOWN = {
    "encodec_24khz": Known(url=f"{_ENCODEC}/encodec_24khz-d7cc33bc.th", sha256="d7cc33bc"),
    "encodec_48khz": Known(url=f"{_ENCODEC}/encodec_48khz-7e698e3e.th", sha256="7e698e3e"),
}

ATTEMPTS = 6
TIMEOUT_S = 30.0
PAUSE_S = 1.0
"""Before the second attempt; doubled before each further one."""
_CHUNK = 2**20

Watch = Callable[[int, int | None], None]
"""Told the bytes that are there, and how many there will be, if the server says."""


class FetchError(ValueError):
    """A file cannot be fetched, or is not the one that is wanted; the message says which and what to do."""


class _PassingError(Exception):
    """An attempt failed for a reason that may pass."""


def fetch(
    source: str,
    out: Path,
    *,
    sha256: str = "",
    name: str = "",
    watch: Watch = lambda done, total: None,
    attempts: int = ATTEMPTS,
    timeout_s: float = TIMEOUT_S,
    pause_s: float = PAUSE_S,
) -> Path:
    """Fetch a file into a folder; one that is there already, with the right sha256, is kept.

    Args:
        source: An address, or a name of `KNOWN`.
        out: Made if it is not there.
        sha256: 64 hexadecimal digits. With a known name it may be left out, or be a beginning of at least eight.
        name: Of the file; by default the last part of the address.
        timeout_s: Silence of the server after which an attempt ends.

    Returns:
        The file.

    Raises:
        FetchError: a faulty argument, no such file, another sha256, or no success within `attempts`.
    """
    known = KNOWN.get(source)
    url = known.url if known else source
    target = out / _file_name(url, name)
    wanted = _wanted(sha256.lower(), known)
    if target.exists():
        if (found := _sha256(target)).startswith(wanted):
            return target
        raise FetchError(
            f"{target} is there already, but {_differs(found, wanted)} Remove it, or fetch into another folder."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise FetchError(f"{out}: cannot be made: {fault.strerror}") from fault
    part = target.with_name(f"{target.name}.part")
    for resumed in (part.exists(), False):
        _persist(url, part, watch, attempts, timeout_s, pause_s)
        if (found := _sha256(part)).startswith(wanted):
            part.replace(target)
            return target
        part.unlink()
        # What an earlier call left may be the beginning of another file.
        if not resumed:
            break
    raise FetchError(
        f"{url}: what came is thrown away, for {_differs(found, wanted)} Check the address and the sha256."
    )


def _persist(url: str, part: Path, watch: Watch, attempts: int, timeout_s: float, pause_s: float) -> None:
    """Receive the whole file in at most so many attempts."""
    for attempt in range(1, attempts + 1):
        try:
            return _receive(url, part, watch, timeout_s)
        except _PassingError as fault:
            if attempt == attempts:
                raise FetchError(
                    f"{url}: gave up after {attempt} attempt(s): {fault}. What came so far is kept: the same command goes on."
                ) from fault
            time.sleep(min(pause_s * 2 ** (attempt - 1), 30.0))
    return None


def _receive(url: str, part: Path, watch: Watch, timeout_s: float) -> None:
    """Append to `part` what it lacks, or begin anew where the server cannot send ranges."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "braid"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            start, total = _place(response, have)
            with _opened(part, "ab" if start else "wb") as file:
                done = _copy(response, file, start, total, watch)
    except urllib.error.HTTPError as fault:
        if fault.code == 416 and have:
            # The server has no more: the part is whole, or longer than the file, which its sha256 shows.
            return
        if fault.code in (408, 425, 429) or fault.code >= 500:
            raise _PassingError(f"the server answered {fault.code} {fault.reason}") from fault
        raise FetchError(f"{url}: the server answered {fault.code} {fault.reason}; check the address.") from fault
    except (OSError, http.client.HTTPException) as fault:
        # URLError, silence, a broken connection or a broken TLS session: all but HTTP's own are OSErrors.
        reason = fault.reason if isinstance(fault, urllib.error.URLError) else fault
        if url.startswith("file:"):
            raise FetchError(f"{url}: cannot be read: {reason}") from fault
        if isinstance(reason, TimeoutError):
            raise _PassingError(f"no answer within {timeout_s:g} s") from fault
        raise _PassingError(str(reason) or type(fault).__name__) from fault
    if total is not None and done < total:
        raise _PassingError(f"the connection ended after {done:,} of {total:,} bytes")


def _place(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """The byte at which the answer begins, 0 or `have`, and the length of the whole file."""
    length = response.headers.get("Content-Length")
    size = int(length) if length and length.isdigit() else None
    if getattr(response, "status", None) != 206:
        return 0, size
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != have:
        raise FetchError(
            f"{response.url}: asked for the bytes from {have}, the server sent others; remove the .part file."
        )
    return have, int(found[2]) if found[2] != "*" else None if size is None else have + size


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        # Unbuffered, so that a full disk shows where the file is written, and not where it is closed.
        return part.open(mode, buffering=0)
    except OSError as fault:
        raise FetchError(f"{part}: cannot be written: {fault.strerror}") from fault


def _copy(response: http.client.HTTPResponse, file: IO[bytes], done: int, total: int | None, watch: Watch) -> int:
    watch(done, total)
    while data := response.read(_CHUNK):
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as fault:
            raise FetchError(f"{file.name}: cannot be written: {fault.strerror}; make room and try again.") from fault
        done += len(data)
        watch(done, total)
    return done


def _wanted(sha256: str, known: Known | None) -> str:
    """The sha256 to check, or its beginning."""
    if re.fullmatch(r"[0-9a-f]*", sha256) is None or len(sha256) > 64:
        raise FetchError(f"--sha256 {sha256!r} is no sha256: give its 64 hexadecimal digits.")
    if known is None:
        if len(sha256) < 64:
            raise FetchError(
                f"--sha256 has {len(sha256)} of 64 digits: without the whole of it nobody can say what was fetched. Its "
                f"publisher may state it; `sha256sum` tells it of a file that you trust. Known names: {', '.join(KNOWN)}."
            )
        return sha256
    shorter = min(len(sha256), len(known.sha256))
    if sha256[:shorter] != known.sha256[:shorter] or (sha256 and len(sha256) < len(known.sha256)):
        raise FetchError(f"--sha256 {sha256} is not that of {known.url}, which begins with {known.sha256}.")
    return sha256 or known.sha256


def _file_name(url: str, name: str) -> str:
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise FetchError(
            f"{url!r} is no address that can be fetched (http, https, file), nor a known name: {', '.join(KNOWN)}."
        )
    name = name or unquote(urlsplit(url).path).rpartition("/")[2]
    if not name or "/" in name or name in (".", ".."):
        raise FetchError(f"{url}: what the file shall be called does not follow from the address; say so with --name.")
    return name


def _differs(found: str, wanted: str) -> str:
    return f"its sha256 is {found}, and {wanted}{'...' * (len(wanted) < 64)} is wanted."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
