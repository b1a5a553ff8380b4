"""The process of one step: `python -m pipelines.recurring.step STATE RUN STEP ATTEMPT [PARENT]`.

Enters: a plan in the state folder. Leaves: the result beside it, and exit code 0 (done, or not due), 1 (failed) or 3
(refused). Always holds: a process that was started by a tick dies with it, so that two ticks never work at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence

from pipelines.crash import crash_point
from pipelines.recurring.state import Result, State, now

EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "refused": 3}

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Do a step and write down what it came to; the exit code."""
    folder, number, step, attempt, *parent = arguments
    if parent:
        _die_with(int(parent[0]))
    return run_step(State(folder), int(number), step, int(attempt))


def run_step(state: State, number: int, step: str, attempt: int) -> int:
    """Do a step of a run; the exit code."""
    plan = state.plan(number)
    os.chdir(plan.folder)
    begun, clock = now(), time.monotonic()
    crash_point("step_begins")
    units: list[str] = []
    try:
        from pipelines.recurring.steps import do_step

        done = do_step(step, plan)
        outcome, why, did = done.outcome, done.why, done.did
    except Exception as error:
        traceback.print_exc()
        own = type(error).__module__.partition(".")[0] in ("pipelines", "model", "slurm")
        outcome, did = "failed", {}
        why = str(error) if own else f"{type(error).__name__}: {error}"
        units = list(getattr(error, "units", []))
    result = Result(
        step=step,
        attempt=attempt,
        outcome=outcome,
        why=why,
        begun=begun,
        seconds=round(time.monotonic() - clock, 3),
        host=socket.gethostname(),
        did=did,
        units=units,
    )
    print(f"{step}: {outcome}: {why}", flush=True)
    crash_point("step_ended")
    state.add_result(number, result)
    return EXIT_CODES[outcome]


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It ended before we asked.
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
