"""How soon `braid --help` answers, against `python -c "import typer, rich"`: `python -m benchmarks.startup`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measuring import close, medians, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    braid = [str(Path(sys.executable).parent / "braid"), "--help"]
    bare = [sys.executable, "-c", "import typer, rich.console, rich.table, rich.panel"]
    ours, theirs = medians(
        lambda: subprocess.run(braid, check=True, capture_output=True),
        lambda: subprocess.run(bare, check=True, capture_output=True),
        repeat=7 if arguments.quick else 25,
    )
    close([result("braid --help (lower is better)", ours, theirs, "s", checked="both exit 0")])


if __name__ == "__main__":
    main()
