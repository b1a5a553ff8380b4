"""How a dataset grew: totals of its versions, from their roll-ups alone.

Enters: a dataset. Leaves: a `Growth` for each of at most `most` versions, evenly spread, the first and the newest among them.
Always holds: one roll-up and one log entry are read for each, whatever the number of versions and shards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipelines.shards.dataset import Dataset
from pipelines.shards.log import commit_name
from pipelines.shards.rollup import roll_up_name, rolled_up_versions
from pipelines.shards.statistics import MODALITIES


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Totals of one version."""

    version: int
    time_ms: int | None
    """When it was committed, milliseconds since 1970; None where the log no longer says."""
    documents: int
    tokens: dict[str, int]
    """By modality."""


def growth(dataset: Dataset, most: int = 48) -> list[Growth]:
    """Versions up to this one, ascending; those whose roll-up was lost are left out."""
    versions = [v for v in rolled_up_versions(dataset.storage) if v <= dataset.version]
    if len(versions) > most:
        versions = [versions[index * (len(versions) - 1) // (most - 1)] for index in range(most)]
    return [_of(dataset, version) for version in versions]


def _of(dataset: Dataset, version: int) -> Growth:
    sources = json.loads(dataset.storage.read(roll_up_name(version)))["sources"].values()
    return Growth(
        version=version,
        time_ms=_committed_ms(dataset, version),
        documents=sum(source["documents"] for source in sources),
        tokens={m: sum(source["tokens"][m] for source in sources) for m in MODALITIES},
    )


def _committed_ms(dataset: Dataset, version: int) -> int | None:
    log = dataset.storage.below("shards")
    if not log.exists(commit_name(version)):
        return None
    with log.open(commit_name(version)) as file:
        # The first line of a commit says when; the rest names its files, perhaps a hundred thousand.
        head = bytes(file.read(4096)).partition(b"\n")[0]
    first = json.loads(head) if head.endswith(b"}") else {}
    return first.get("commitInfo", {}).get("timestamp")
