"""What the tasks of a job say, merged.

Enters: a job's folder. Leaves: lines, each with its task. Always holds: with `follow`, lines come in the order in which they
are seen, until the job has ended and all is read; a line is never torn.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 0.5


def read(
    folder: Path, job_id: str, *, task: int | None = None, ended: Callable[[], bool] | None = None
) -> Iterator[tuple[int, str]]:
    """The lines of a job's tasks, over all restarts.

    Args:
        task: only this one; None merges all.
        ended: whether the job is done; with it, lines are followed as they come.
    """
    name = re.compile(rf"{re.escape(job_id)}_(\d+)_log\.out")
    places: dict[int, int] = {}
    while True:
        done = ended is None or ended()
        for path in sorted(folder.iterdir()):
            match = name.fullmatch(path.name)
            if match and (task is None or int(match[1]) == task):
                number = int(match[1])
                with path.open("rb") as file:
                    file.seek(places.get(number, 0))
                    data = file.read()
                # The last line may still be being written.
                whole = len(data) if done else data.rfind(b"\n") + 1
                places[number] = places.get(number, 0) + whole
                for line in data[:whole].decode(errors="replace").splitlines():
                    yield number, line
        if done:
            return
        time.sleep(POLL_S)
