"""The S3 of `tests.faults` for this process and those that it starts, and files put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.corpus import remote
from tests.faults import FaultyS3, faulty_s3


@contextmanager
def object_store() -> Iterator[FaultyS3]:
    """A fresh S3 with the bucket `bucket`, named by the environment as users name theirs."""
    with faulty_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        remote._s3.cache_clear()
        yield server
    remote._s3.cache_clear()


def put(uri: str, data: bytes) -> str:
    filesystem, path = remote.file_system(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    return uri


def copy(folder: Path, uri: str) -> None:
    """A folder with all that is in it."""
    for file in folder.rglob("*"):
        if file.is_file():
            put(f"{uri}/{file.relative_to(folder)}", file.read_bytes())
