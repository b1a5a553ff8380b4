"""Other systems, each in an environment of its own under `.peers/`, so that none of them is a dependency of Braid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(".peers")


def python_with(name: str, *packages: str) -> Path:
    """The interpreter of a virtual environment that has these packages; it is made on the first call."""
    folder = FOLDER / name
    python, stamp = (folder / "bin/python").absolute(), folder / "installed"
    wanted = " ".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {wanted} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)
        stamp.write_text(wanted)
    return python
