"""Named places at which a crash test kills this process, as a power cut would.

    BRAID_CRASH=after_write:3:/tmp/once braid tokenize RECIPE.yaml

kills, with SIGKILL, the process that comes by `after_write` for the third time, if it can remove the file `/tmp/once`: so
of all processes of a job one is killed, once. Without the variable a place costs one comparison.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    "before_ledger",
    "after_ledger",
    "before_write",
    "after_write",
    "after_publish",
    "before_commit",
    "after_rejects",
    "after_commit",
    "after_roll_up",
)
"""In the order in which a unit passes them; those of writing lie in the workers, the others in the driver."""

PIPELINE_POINTS = (
    "lease_taken",
    "plan_written",
    "before_step",
    "step_begins",
    "stage_claimed",
    "stage_trained",
    "evaluated",
    "export_copied",
    "exported",
    "step_ended",
    "after_step",
    "before_record",
    "after_record",
    "before_release",
)
"""In the order in which a recurring pipeline passes them; from `step_begins` to `step_ended` they lie in a step's process."""

SAVE_POINTS = ("while_saving", "before_rename")
"""Those of a checkpoint: its data is written, its record too. A training process passes them."""

_ARMED = os.environ.get("BRAID_CRASH", "")
_passed = 0


def crash_point(name: str) -> None:
    """Die here, if the environment says so."""
    if not _ARMED.startswith(f"{name}:"):
        return
    global _passed
    _passed += 1
    _, count, once = _ARMED.split(":", 2)
    if _passed >= int(count):
        try:
            Path(once).unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
