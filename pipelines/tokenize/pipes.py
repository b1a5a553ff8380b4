"""Processes beside a worker, to which it speaks in pickles over pipes: they trust it, for it has started them."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import traceback
from contextlib import suppress
from typing import BinaryIO

from pipelines.corpus.errors import TransientError

PIPE_BYTES = 2**20
"""Of the pipes to and from a process, in place of 64 kB."""

_KEEPING = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""For glibc: memory that a picture or sound leaves is for the next one. Given back, each of its pages would be cleared and
mapped anew, which took as long as decoding."""

_ONE_CPU = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Each process is one of the CPUs that the worker has; to Ray that variable says how many these are."""

GIVEN_UP = "given up"
"""Said to the process that writes in place of a unit's end; its answer comes when nothing of the unit is left."""


class GivenUpError(Exception):
    """In such a process: its worker has given the unit up."""


class WorkerGoneError(Exception):
    """In such a process: its worker has ended."""


def started(module: str, *descriptors: int) -> subprocess.Popen[bytes]:
    """`python -m module DESCRIPTOR...`, with this process's path for modules, and the open files that are named."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, descriptors)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=descriptors,
        env=_KEEPING | os.environ | _ONE_CPU | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdin
    assert process.stdout
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            # Where there are many pipes the kernel may refuse; then what is sent takes more turns to go through.
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
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


def put(pipe: BinaryIO, data: bytes) -> None:
    """Write bytes so that `answer_of` gives them whole, to be looked into or passed on."""
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def answer_of(process: subprocess.Popen[bytes], what: str, where: str) -> bytes:
    """The bytes that a process puts next.

    Args:
        what: the process, in words.
        where: what it is about.

    Raises:
        TransientError: it has ended, such as for want of memory.
    """
    assert process.stdout
    length = process.stdout.read(8)
    data = process.stdout.read(int.from_bytes(length, "little"))
    if len(length) < 8 or len(data) < int.from_bytes(length, "little"):
        raise TransientError(
            f"{what} ended with exit code {process.wait()}, at {where}; if it was for want of memory, lower "
            "cluster.cpus_per_worker"
        )
    return data


def sendable(error: Exception) -> Exception | str:
    """The error, with a note of where it was raised, or its traceback alone where it does not survive the way."""
    where = "".join(traceback.format_exception(error))
    error.add_note(where)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return where
    return error
