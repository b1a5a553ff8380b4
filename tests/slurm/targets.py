"""What jobs of the tests run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slurm import context

if TYPE_CHECKING:
    from pipelines.shards.writer import WrittenShard
    from pipelines.tokenize.units import WorkUnit


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


def tokenize_on_named_gpus(recipe: str, arguments: Sequence[str]) -> None:
    """Tokenize on GPUs that are there in name only, and write down which worker did what; `arguments`: that file."""
    from pipelines.tokenize import main, pool

    class Witness(pool.UnitWorker):
        def run(self, unit: WorkUnit) -> WrittenShard:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            with Path(arguments[0]).open("a") as file:
                file.write(json.dumps([unit.source, os.uname().nodename, gpus]) + "\n")
            return super().run(unit)

    pool.GPU = "cpu"
    pool.UnitWorker = Witness  # type: ignore[misc]
    main(recipe)


def full_disk(recipe: str, arguments: Sequence[str]) -> None:
    """Fail as a write to a full disk does."""
    raise OSError(28, "No space left on device", "/data/checkpoint")
