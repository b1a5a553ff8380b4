"""The lease of a pipeline: one process at a time works on it, wherever it runs.

    STATE/lease/00000042.json       who holds generation 42; its modification time is the heartbeat
    STATE/lease/00000042.released   the holder is done

Enters: the state folder, on a local disk or on one that machines share. Leaves: a `Lease`, or a `HeldError` that names
the holder. Always holds: a generation is created by one process (a hard link, which NFS makes once for whoever asks), and
taking the next one removes it. So a holder that slept, while it was taken for dead, finds its file gone when it next
touches it, which the file server decides and no cache: it stops before it commits anything. Times are the file server's
own, on both sides of every comparison, so clocks of machines need not agree.

A lease ends with its holder: at once where the holder was a process of this machine and is gone, else `ttl_s` after its
last heartbeat; and `most_h` after it was taken in any case, so that a process that hangs cannot hold it for ever.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.crash import crash_point
from pipelines.exclusive import create_exclusively
from pipelines.recurring.recipe import LeaseSettings

BEATS = 6
"""Heartbeats within `ttl_s`."""


class HeldError(RuntimeError):
    """Another process works on the pipeline; the message names it."""


class LostError(RuntimeError):
    """This process no longer holds the lease, so it must not commit anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int
    process: str
    """What tells this process from any other that had its id: the machine's start, the id's name space, its own start."""
    user: str
    what: str
    """Such as `tick`."""
    taken: str
    """When, in UTC, by the holder's clock; for people."""
    token: str
    """Of this one holding, unlike any other."""

    @classmethod
    def me(cls, what: str) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_identity(os.getpid()),
            user=whoami(),
            what=what,
            taken=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this very machine and has ended; False where that cannot be known."""
        machine = self.process.rpartition(" ")[0]
        if not machine or machine != process_identity(os.getpid()).rpartition(" ")[0]:
            return False
        return process_identity(self.pid) != self.process

    def __str__(self) -> str:
        return f"{self.what} of {self.user} on {self.host}, process {self.pid}, since {self.taken}"


class Lease:
    """A lease that this process holds; a context manager that lets go of it."""

    def __init__(self, folder: Path, generation: int, settings: LeaseSettings, content: bytes) -> None:
        """Args:
        content: of the file, by which this holder knows it: a number comes again where somebody has emptied the folder.
        """
        self.generation = generation
        self._content = content
        self._file = _file(folder, generation)
        self._settings = settings
        self._until = time.monotonic() + settings.most_h * 3600
        self._ended = threading.Event()
        self._lost = ""
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    @classmethod
    def take(cls, folder: Path, settings: LeaseSettings, what: str) -> Self:
        """Take the lease of a folder.

        Raises:
            HeldError: it is held, or another process took it at this moment.
        """
        folder.mkdir(parents=True, exist_ok=True)
        newest = _generations(folder)[-1:]
        if newest and (holder := read_holder(folder)) and (age := _in_force(folder, holder, settings)):
            raise HeldError(
                f"{holder}, holds the lease in {folder}; its last heartbeat was {age:.0f} s ago, and it is taken for dead "
                f"after {settings.ttl_s:.0f} s without one"
            )
        generation = (newest[0] if newest else 0) + 1
        mine = json.dumps(asdict(Holder.me(what)), indent=1).encode()
        if not create_exclusively(_file(folder, generation), mine):
            raise _taken_at_this_moment(folder)
        if _generations(folder)[-1] != generation:
            # It was taken and given back more than once since we looked, and our number was free again.
            _file(folder, generation).unlink(missing_ok=True)
            raise _taken_at_this_moment(folder)
        crash_point("lease_taken")
        # From here on whoever held it before, and only slept, cannot pass `require`.
        for older in _generations(folder)[:-1]:
            _file(folder, older).unlink(missing_ok=True)
            _released(folder, older).unlink(missing_ok=True)
        return cls(folder, generation, settings, mine)

    def require(self) -> None:
        """Make sure, with the file server, that the lease is still held.

        Raises:
            LostError: it is not.
        """
        if not self._lost:
            if time.monotonic() > self._until:
                self._lost = f"it was held for lease.most_h = {self._settings.most_h:g} hours"
            else:
                self._touch()
        if self._lost:
            raise LostError(f"lost the lease {self._file}: {self._lost}; nothing more is committed by this process")

    @property
    def lost(self) -> bool:
        """Whether the heartbeat has found the lease gone, or its time over."""
        return bool(self._lost)

    def release(self) -> None:
        """Let go of it, once."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._heart.join()
        if not self._lost and self._file.exists():
            crash_point("before_release")
            create_exclusively(self._file.with_suffix(".released"), b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self._settings.ttl_s / BEATS):
            if time.monotonic() > self._until:
                self._lost = f"it was held for lease.most_h = {self._settings.most_h:g} hours"
            else:
                self._touch()
            if self._lost:
                return

    def _touch(self) -> None:
        try:
            os.utime(self._file)
            if self._file.read_bytes() != self._content:
                self._lost = f"it was taken over by {read_holder(self._file.parent)}"
        except FileNotFoundError:
            holder = read_holder(self._file.parent)
            self._lost = f"it was taken over by {holder}" if holder else "its file was removed"
        except OSError as error:
            # A file server that is away for a moment is no reason to stop; for longer, and others take us for dead.
            if error.errno == errno.ESTALE:
                self._lost = "its file was removed on the server"


def _taken_at_this_moment(folder: Path) -> HeldError:
    if holder := read_holder(folder):
        return HeldError(f"{holder}, holds the lease in {folder}: both asked for it at this moment, and it was faster")
    return HeldError(f"another process took the lease in {folder} and gave it back at this moment; ask again")


def read_holder(folder: Path) -> Holder | None:
    """Who holds the lease, or held it last; None where it is free."""
    generations = _generations(folder)
    if not generations or _released(folder, generations[-1]).exists():
        return None
    try:
        return Holder(**json.loads(_file(folder, generations[-1]).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Holder(host="?", pid=0, process="", user="?", what="a damaged lease", taken="?", token="")


def heartbeat_age_s(folder: Path) -> float:
    """Seconds since the newest generation was last heard of, by the file server's clock."""
    file = _file(folder, _generations(folder)[-1])
    probe = folder / f".now.{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    # Opened, because that makes an NFS client ask the server instead of its cache.
    with file.open("rb") as opened:
        return now - os.fstat(opened.fileno()).st_mtime


def whoami() -> str:
    """The user's name; the number of one without."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def process_identity(pid: int) -> str:
    """What tells a process from all others that had or will have its id; "" if there is none, or no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink()
        # The name in parentheses may hold anything, so count from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie does nothing any more.
    return "" if fields[0] == "Z" else f"{boot} {space} {fields[19]}"


def _in_force(folder: Path, holder: Holder, settings: LeaseSettings) -> float:
    """Age of the heartbeat of a lease that is in force, never 0; 0 if it is over."""
    if holder.is_gone:
        return 0.0
    try:
        age = max(heartbeat_age_s(folder), 0.001)
    except FileNotFoundError:
        return 0.0
    return age if age < settings.ttl_s else 0.0


def _generations(folder: Path) -> list[int]:
    """Ascending."""
    return sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit())


def _file(folder: Path, generation: int) -> Path:
    return folder / f"{generation:08d}.json"


def _released(folder: Path, generation: int) -> Path:
    return folder / f"{generation:08d}.released"
