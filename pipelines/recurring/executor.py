"""How the steps of a run are started.

Enters: a plan and the lease. Leaves: a result of each step in the state folder. Always holds: a step begins only after
the one before it has ended well, and none begins without the lease.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipelines.crash import crash_point
from pipelines.recurring.lease import Lease
from pipelines.recurring.recipe import PipelineRecipe, Retries
from pipelines.recurring.state import ENDED_WELL, Plan, Result, State, now, seconds_since

_POLL_S = 0.05
_PATIENCE_S = 10.0
"""From the request to end to the kill."""

ROOT = Path(__file__).parents[2]
"""Where `pipelines` is imported from, also by a process that starts elsewhere."""


class Executor(Protocol):
    """Starts the steps of runs."""

    name: str

    def start(self, state: State, plan: Plan, retries: Retries, lease: Lease) -> bool:
        """Start the steps of a run.

        Returns:
            Whether all is over; False if the steps go on by themselves.

        Raises:
            LostError: another process has taken the lease; what this one had started was ended.
        """

    def under_way(self, state: State, plan: Plan) -> str:
        """What of a run is still going on, in words; "" if nothing is. Asked by who holds the lease.

        Where nothing is, results are added for steps that have left none and of which somebody else knows how they ended.
        """


def executor_of(recipe: PipelineRecipe) -> Executor:
    """Who starts the steps of a pipeline."""
    return executor_named("slurm" if recipe.slurm else "local", recipe)


def executor_named(name: str, recipe: PipelineRecipe) -> Executor:
    """Who started the steps of a run, by the name in its plan."""
    if name == "local":
        return Local()
    from pipelines.recurring.cluster import OnSlurm

    return OnSlurm(recipe.slurm)


class Local:
    """Runs the steps here, one after the other, each in a process of its own that dies with this one."""

    name = "local"

    def start(self, state: State, plan: Plan, retries: Retries, lease: Lease) -> bool:
        for step in plan.steps:
            for attempt in range(1, retries.attempts + 1):
                if attempt > 1:
                    _wait(retries.wait_s, lease)
                lease.require()
                result = self._attempt(state, plan, step, attempt, lease)
                if result.outcome != "failed":
                    break
            if result.outcome not in ENDED_WELL:
                break
        return True

    def under_way(self, state: State, plan: Plan) -> str:
        # Its steps die with the process that held the lease, which is ours now.
        return ""

    def _attempt(self, state: State, plan: Plan, step: str, attempt: int, lease: Lease) -> Result:
        log = state.log(plan.number, step, attempt)
        where = [str(state.folder), str(plan.number), step, str(attempt), str(os.getpid())]
        begun = now()
        crash_point("before_step")
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.recurring.step", *where],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=step_environment(),
                # A group of its own, so that all that it starts can be ended with it.
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    if lease.lost:
                        lease.require()
                    time.sleep(_POLL_S)
            finally:
                _end(process)
        crash_point("after_step")
        for result in state.results(plan.number, [step]):
            if result.attempt == attempt:
                return result
        result = Result(
            step=step,
            attempt=attempt,
            outcome="failed",
            why=f"its process {_how_it_ended(process.returncode)}; see {log}",
            begun=begun,
            seconds=round(seconds_since(begun), 3),
            host=socket.gethostname(),
        )
        state.add_result(plan.number, result)
        return result


def step_environment() -> dict[str, str]:
    """The environment of a step's process: this one's, with Braid on the path."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _wait(seconds: float, lease: Lease) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not lease.lost:
        time.sleep(min(_POLL_S, seconds))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it has started; nothing where it has ended well by itself."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
    if process.poll() is None or process.returncode:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL): out of memory, or by hand"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no result"
