"""The code of a job as one archive in its folder, so that whatever starts later runs what was submitted.

Enters: packages beside this one. Leaves: `code.zip`, and on each node its content on a local disk. Always holds: the archive
is first on the path of every task; what is unpacked is named by the archive's sha256, appears whole by one rename and
belongs to the user alone; equal code gives an equal archive.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

_LEFT_OUT = {"__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache"}

_TEXT = {".py", ".yaml", ".json", ".md", ".css", ".js", ".txt"}

# The oldest time that a zip can hold: the archive depends on the code, not on when it was checked out.
_TIME = (1980, 1, 1, 0, 0, 0)


def archive(names: Iterable[str], file: Path) -> str:
    """Write an archive of packages, or of folders such as `configs`, that lie beside `slurm/`; its sha256.

    Names that are not there are left out: an installed Braid has its recipes inside a package.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for path in _files(names):
            info = zipfile.ZipInfo(str(path.relative_to(ROOT)), _TIME)
            # Weights and pictures do not shrink, and cost most of the time.
            info.compress_type = zipfile.ZIP_DEFLATED if path.suffix in _TEXT else zipfile.ZIP_STORED
            info.external_attr = 0o600 << 16
            packed.writestr(info, path.read_bytes())
    file.chmod(0o600)
    return _sha256(file)


def unpack(file: Path) -> Path:
    """The folder on this node's own disk with an archive's content; made if it is not there."""
    parent = Path(tempfile.gettempdir()) / f"braid-code-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid() or parent.stat().st_mode & 0o077:
        raise PermissionError(f"{parent} must be a folder of this user alone, for code is run from it; remove it")
    folder = parent / _sha256(file)[:20]
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(dir=parent))
        with zipfile.ZipFile(file) as packed:
            packed.extractall(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another task of this node was faster.
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _files(names: Iterable[str]) -> Iterator[Path]:
    for name in sorted(set(names)):
        for path in sorted((ROOT / name).rglob("*")):
            if path.is_file() and not _LEFT_OUT & set(path.relative_to(ROOT).parts):
                yield path


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
