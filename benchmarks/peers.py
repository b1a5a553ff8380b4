"""Other systems, each in an environment of its own under `.peers/`, so that none of them is a dependency of Braid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(".peers")


def python_with(name: str, *packages: str, beside: bool = False) -> Path:
    """The interpreter of a virtual environment that has these packages; it is made on the first call.

    Args:
        beside: without their dependencies, which are taken from this interpreter's own environment, where that has them:
            for packages whose requirements have no CPU build.
    """
    folder = FOLDER / name
    python, stamp = (folder / "bin/python").absolute(), folder / "installed"
    wanted = " ".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {wanted} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if beside:
            (site,) = (folder / "lib").glob("python*/site-packages")
            (site / "beside.pth").write_text(
                "".join(f"{path}\n" for path in sys.path if path.endswith("site-packages"))
            )
        flags = ["-q", "--disable-pip-version-check", *(["--no-deps"] if beside else [])]
        subprocess.run([python, "-m", "pip", "install", *flags, *packages], check=True)
        stamp.write_text(wanted)
    return python
