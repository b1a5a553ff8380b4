"""What jobs of the tests run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from slurm import context


def hello(recipe: str, arguments: Sequence[str]) -> None:
    """Say where this runs, and what it was given."""
    print(f"recipe {Path(recipe).read_text().strip()!r} arguments {list(arguments)}")
    print(f"gpus {os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}")
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} code {Path(__file__).parents[2].name}")


def sleep(recipe: str, arguments: Sequence[str]) -> None:
    """Sleep so many seconds."""
    time.sleep(float(arguments[0]))


def fail(recipe: str, arguments: Sequence[str]) -> None:
    """Fail in one task; the others would wait for ever."""
    if os.environ["RANK"] == "1":
        raise ValueError("the sky is falling")
    time.sleep(600)


def vanish(recipe: str, arguments: Sequence[str]) -> None:
    """Lose a task without a word, in the first starts of the job."""
    job = context.current()
    assert job is not None
    if job.restarts < int(arguments[0]):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        time.sleep(600)
    print("whole again")


def exit_with(recipe: str, arguments: Sequence[str]) -> None:
    """End with a code of its own, after so many seconds if they are named."""
    time.sleep(float(arguments[1]) if len(arguments) > 1 else 0)
    raise SystemExit(int(arguments[0]))


def full_disk(recipe: str, arguments: Sequence[str]) -> None:
    """Fail as a write to a full disk does."""
    raise OSError(28, "No space left on device", "/data/checkpoint")
