"""One step, in a process of its own: `python -m pipelines.recurring.step STATE RUN STEP ATTEMPT PARENT`, or a task of a
SLURM job.

Enters: a plan in the state folder. Leaves: the result beside it. Always holds: a process that a tick has started dies
with it, so that two ticks never work at once; a step of a run that was recorded meanwhile, as lost, does nothing; a job
that SLURM queues again leaves no result but its last.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import slurm.context
from pipelines.crash import crash_point
from pipelines.exclusive import create_exclusively
from pipelines.recurring.due import Due
from pipelines.recurring.state import Result, State, now

EXIT_CODES = {"done": 0, "skipped": 0, "failed": 1, "refused": 3}

_PR_SET_PDEATHSIG = 1

_POLL_S = 0.2
_DECISION_TIMEOUT_S = 600.0


class StepFailedError(RuntimeError):
    """Ends the job of a step that failed or refused; what waits for it is then cancelled."""


def main(arguments: Sequence[str]) -> int:
    """Do a step for a tick on this machine; the exit code."""
    folder, number, step, attempt, parent = arguments
    _die_with(int(parent))
    return EXIT_CODES[run_step(State(folder), int(number), step, int(attempt)).outcome]


def on_cluster(recipe: str, arguments: Sequence[str]) -> None:
    """Do a step as a job: what a job names as `pipelines.recurring.step:on_cluster`; every task of it calls this.

    Args:
        recipe: not read; the plan has all recipes.
        arguments: state folder, number of the run, step.

    Raises:
        StepFailedError: the step failed or refused.
    """
    state, number, step = State(arguments[0]), int(arguments[1]), arguments[2]
    job = slurm.context.current()
    if job and job.rank:
        if step == "pretrain":
            _follow(state, number, step)
        return
    result = run_step(state, number, step, 1)
    if EXIT_CODES[result.outcome]:
        raise StepFailedError(f"{step}: {result.why}")


def run_step(state: State, number: int, step: str, attempt: int) -> Result:
    """Do a step of a run and write down what it came to."""
    if state.record(number):
        raise StepFailedError(f"run {number} was recorded as ended meanwhile, so its {step} does nothing")
    before = [result for result in state.results(number, [step]) if result.attempt == attempt]
    if before:
        return before[0]
    plan = state.plan(number)
    os.chdir(plan.folder)
    begun, clock = now(), time.monotonic()
    crash_point("step_begins")
    units: list[str] = []
    try:
        from pipelines.recurring.steps import Done, Work, do_step, is_due

        work = Work.of(plan)
        due = _decide(state, number, step, attempt, is_due(step, work))
        done = do_step(step, work, due) if due.due else Done(outcome="skipped", why=due.why)
        outcome, why, did = done.outcome, done.why, done.did
    except Exception as error:
        if _queued_again(error):
            raise
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
    return result


def _decide(state: State, number: int, step: str, attempt: int, due: Due) -> Due:
    """Whether the step is done, as all tasks of its job and all starts of that job have it: the first answer stands."""
    file = _decision(state, number, step, attempt)
    create_exclusively(file, json.dumps(asdict(due)).encode())
    return Due(**json.loads(file.read_bytes()))


def _follow(state: State, number: int, step: str) -> None:
    """Be another task than the first of a job: do what that one has decided."""
    from pipelines.recurring.steps import Work, do_step

    file = _decision(state, number, step, 1)
    deadline = time.monotonic() + _DECISION_TIMEOUT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise StepFailedError(
                f"{file}: the first task has not written it in {_DECISION_TIMEOUT_S:.0f} s; see its log"
            )
        time.sleep(_POLL_S)
    due = Due(**json.loads(file.read_bytes()))
    if due.due:
        plan = state.plan(number)
        os.chdir(plan.folder)
        do_step(step, Work.of(plan), due)


def _decision(state: State, number: int, step: str, attempt: int) -> Path:
    return state.run_folder(number) / f"{step}.{attempt}.decision"


def _queued_again(error: Exception) -> bool:
    """Whether the job that this is a task of goes on later: then this is not its end."""
    job = slurm.context.current()
    return job is not None and (bool(job.requeued) or isinstance(error, slurm.context.LostRanksError))


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It ended before we asked.
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
