"""Statistics of each version, rolled up beside the table: a report opens one file and no shard.

Enters: a version and what its commit did. Leaves: `statistics/<version>.json`. Always holds: a roll-up that is missing,
because its job died first, is made from the nearest earlier one and the footers of the shards that came or went since.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipelines.sequence import Vocabulary
from pipelines.shards.log import changes
from pipelines.shards.reader import read_footer
from pipelines.shards.statistics import Statistics
from pipelines.shards.storage import Storage
from pipelines.shards.writer import WrittenShard

_READERS = 8
"""Footers read at once."""


def roll_up_name(version: int) -> str:
    return f"statistics/{version:020d}.json"


def rolled_up_versions(dataset: Storage) -> list[int]:
    return [int(name.removesuffix(".json")) for name in dataset.names("statistics")]


def roll_up(
    dataset: Storage, vocabulary: Vocabulary, version: int, new: Collection[WrittenShard], removed: Collection[str]
) -> None:
    """Write the statistics of the version that a commit of this job made, whatever others have committed since.

    Args:
        removed: names of the shards that the commit took away.
    """
    previous = roll_up_name(version - 1)
    if dataset.exists(previous):
        statistics = _read(dataset, previous)
        for shard in new:
            statistics.merge(Statistics.from_json(shard.statistics))
        for gone in _footers(dataset, removed):
            statistics.subtract(gone)
    else:
        statistics = statistics_of(dataset, vocabulary, version)
    dataset.write(roll_up_name(version), json.dumps(statistics.to_json()).encode())


def statistics_of(dataset: Storage, vocabulary: Vocabulary, version: int) -> Statistics:
    """The statistics of a version, from its roll-up or the nearest earlier one."""
    if dataset.exists(name := roll_up_name(version)):
        return _read(dataset, name)
    earlier = max((v for v in rolled_up_versions(dataset) if v < version), default=None)
    # Version 0 is the empty table.
    statistics = Statistics.empty(vocabulary) if earlier is None else _read(dataset, roll_up_name(earlier))
    since = changes(dataset.below("shards"), (earlier or 0) + 1, version)
    for added in _footers(dataset, sorted(since.added)):
        statistics.merge(added)
    for gone in _footers(dataset, since.removed):
        statistics.subtract(gone)
    return statistics


def _read(dataset: Storage, name: str) -> Statistics:
    return Statistics.from_json(json.loads(dataset.read(name)))


def _footers(dataset: Storage, names: Collection[str]) -> Iterator[Statistics]:
    with ThreadPoolExecutor(_READERS) as pool:
        for footer in pool.map(lambda name: read_footer(dataset, name), names):
            yield Statistics.from_json(json.loads(footer["statistics"]))
