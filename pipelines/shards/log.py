"""The log of a Delta table, commit by commit: what each version added and removed.

Enters: a table's folder and versions. Leaves: file names. `deltalake` says what a version holds but not what it changed,
and asking for the whole at each commit would cost time in proportion to all that was ever committed. The log is Delta's:
one JSON file a version, one action a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import unquote

from pipelines.shards.storage import Storage

_READERS = 16
"""Log files read at once: on an object store each is a round trip."""


@dataclass(frozen=True, slots=True)
class File:
    """A data file as its commit named it."""

    name: str
    size: int
    """Bytes."""
    rows: int


@dataclass(slots=True)
class Changes:
    """What some commits did to a table."""

    added: dict[str, File] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)


def commit_name(version: int) -> str:
    """The log file of a version, below the table's folder."""
    return f"_delta_log/{version:020d}.json"


def commits(table: Storage, first: int, last: int) -> Iterator[Changes]:
    """What each version from `first` to `last` did, in order."""
    with ThreadPoolExecutor(min(_READERS, max(1, last - first + 1))) as pool:
        yield from pool.map(lambda version: _commit(table, version), range(first, last + 1))


def changes(table: Storage, first: int, last: int) -> Changes:
    """What the versions from `first` to `last` did together; a file that came and went is in neither half."""
    total = Changes()
    for commit in commits(table, first, last):
        for name in commit.removed:
            if total.added.pop(name, None) is None:
                total.removed.add(name)
        total.added |= commit.added
    return total


def _commit(table: Storage, version: int) -> Changes:
    result = Changes()
    for line in table.read(commit_name(version)).splitlines():
        action = json.loads(line)
        if add := action.get("add"):
            name = unquote(add["path"])
            result.added[name] = File(name, add["size"], json.loads(add["stats"])["numRecords"])
        elif remove := action.get("remove"):
            result.removed.add(unquote(remove["path"]))
    return result
