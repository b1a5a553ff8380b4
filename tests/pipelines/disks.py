"""Real file systems so small that they are soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 1_000_000


@contextmanager
def small_disk(folder: Path, size: int = SIZE) -> Iterator[Path]:
    """A disk of so many bytes, mounted there; whoever may not mount skips."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes free."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as filler:
        free = subprocess.run(["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True, check=True)
        filler.write(bytes(max(0, int(free.stdout.split()[1]) - left)))
    return file
