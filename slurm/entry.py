"""What each task does first on its node, and what it leaves when it ends.

Enters: `Entry`, pickled by submitit into the job's folder. Leaves: the callable's effects, and records of this attempt in
that folder: `attempt-*.json` (who started where), `requeue-*.json` (the job wishes to be queued again), `fault-*.json` (what
went wrong, in one message), `lost-*.json` (the others were gone). Always holds: the code that runs is that of the archive;
USR2 and TERM never end a task, they are flags for the callable: only the end of its grace kills it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm import code, context, rendezvous
from slurm.context import JobContext, LostRanksError

_LONGEST_FAULT = 4000


@dataclass(frozen=True)
class Entry:
    """A task: `target(recipe, arguments)`, found in the archive."""

    target: str
    """`package.module:callable`."""
    recipe: str
    arguments: tuple[str, ...]
    archive: str
    directory: str
    """Where the callable runs: relative paths of its recipe count from there."""
    ray: dict[str, Any] | None = None
    """Settings of a Ray cluster that the callable runs in; None runs it in every task."""

    def __call__(self) -> None:
        began = time.time()
        task = context.enter()
        _listen(task)
        try:
            _use(code.unpack(Path(self.archive)))
            os.chdir(self.directory)
            if task.rank == 0:
                nodes = os.environ.get("SLURM_JOB_NODELIST", "")
                task.write("attempt", {"started": began, "nodes": nodes, "tasks": task.world_size})
            if self.ray is None:
                rendezvous.join()
                self.run()
            else:
                from slurm.ray_cluster import run

                run(self, task)
        except LostRanksError as error:
            if not task.requeued:
                _leave(task, "lost", error)
                # Others may still wait for this one: the end of a task ends all of them.
                os._exit(1)
        except BaseException as error:
            if not task.requeued:
                _leave(task, "fault", error)
                raise

    def run(self) -> None:
        """Call the callable here."""
        resolve(self.target)(self.recipe, list(self.arguments))


def resolve(target: str) -> Callable[..., Any]:
    """The callable of `package.module:name`.

    Raises:
        ValueError: it is not written like that, or there is none.
    """
    module, colon, name = target.partition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"{target!r} names no callable; write package.module:name")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"{target!r}: {module} has no callable {name}")
    return found  # type: ignore[no-any-return]


def _use(folder: Path) -> None:
    """Import from here, in this process and in those that it starts or submits."""
    code.ROOT = folder
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    others = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(folder), others) if part)


def _listen(task: JobContext) -> None:
    """Note signals, instead of submitit's handlers: one saves in one task alone, and counts a short job's as timeouts."""
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(number, lambda received, frame: task.signals.add(received))


def _leave(task: JobContext, kind: str, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    record = {
        "error": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error)[:_LONGEST_FAULT],
        "rank": task.rank,
        "node": os.uname().nodename,
        "traceback": text[-_LONGEST_FAULT:],
        "at": time.time(),
    }
    try:
        # The first one that fails says why; the others follow from it, as far as anybody can tell.
        context.write_record(task.folder / f"{kind}-{task.attempt}-{task.rank}.json", record)
    except OSError as full:
        print(f"braid: this fault could not be recorded in {task.folder}: {full}", file=sys.stderr)
    print(text, file=sys.stderr, flush=True)
