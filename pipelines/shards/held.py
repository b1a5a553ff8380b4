"""The shards that a dataset version holds, by file name and by unit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.shards.log import Changes, File
from pipelines.shards.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One committed Parquet file."""

    name: str
    path: str
    """Where the file lies: a local path, or a key with its bucket for an object store."""
    size: int
    """Bytes."""
    rows: int

    @property
    def unit(self) -> str:
        """The work unit that the shard holds."""
        return unit_of(self.name)


def unit_of(name: str) -> str:
    """The unit in a shard's file name `<unit>-<attempt>-<footer checksum>.parquet`."""
    return name.partition("-")[0]


class Held:
    """Both ways to find a shard; kept up to date from the log, at a cost in proportion to what was committed since."""

    def __init__(self, folder: Storage, files: Iterable[File]) -> None:
        self._folder = folder
        self.names: dict[str, Shard] = {}
        self.units: dict[str, Shard] = {}
        self._add(files)

    def apply(self, changes: Changes) -> None:
        for name in changes.removed:
            shard = self.names.pop(name)
            # A unit's successor has another id, so nothing else can have taken this place.
            del self.units[shard.unit]
        self._add(changes.added.values())

    def _add(self, files: Iterable[File]) -> None:
        for file in files:
            shard = Shard(name=file.name, path=self._folder.path(file.name), size=file.size, rows=file.rows)
            self.names[shard.name] = shard
            self.units[shard.unit] = shard
