"""Processes beside a worker, to which it speaks in pickles over pipes: they trust it, for it has started them."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from typing import BinaryIO

PIPE_BYTES = 2**20
"""Of the pipe to a process, in place of 64 kB."""


_KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""For glibc: memory that a picture or sound leaves is for the next one. Given back, each of its pages would be cleared and
mapped anew, which took as long as decoding."""


def started(module: str, *descriptors: int) -> subprocess.Popen[bytes]:
    """`python -m module DESCRIPTOR...`, with this process's path for modules, and the open files that are named."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, descriptors)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=descriptors,
        env=_KEEPING | os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdin
    with suppress(OSError):
        # Where there are many pipes the kernel may refuse; then what is sent takes more turns to go through.
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def send(process: subprocess.Popen[bytes], message: object) -> None:
    """Put a message into the process's input; this waits while the pipe is full."""
    assert process.stdin
    pickle.dump(message, process.stdin, protocol=5)
    process.stdin.flush()


def channels() -> tuple[BinaryIO, BinaryIO]:
    """In such a process: what it is given, and where its answers go. What anything else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, answers
