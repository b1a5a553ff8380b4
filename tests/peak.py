"""The most memory that this process has had, for programs that tests start.

Not getrusage's figure: that one begins with the peak of the process that started this one, and growth below it is not seen.
"""

from __future__ import annotations

import re
from pathlib import Path


def peak_kb() -> int:
    """Kilobytes, since the start or the last `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def forget_peak() -> None:
    """Count from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
