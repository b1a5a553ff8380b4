"""Format versions of datasets, and the way from an older one to this one.

Enters: a dataset's table properties. Leaves: nothing, or the same dataset in `FORMAT_VERSION`. Always holds: a step can be
run again after it was killed, because the table says the new version only when its step is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deltalake.exceptions import TableNotFoundError

from pipelines.shards.delta import open_table
from pipelines.shards.schema import FORMAT_VERSION
from pipelines.shards.storage import Storage

STEPS: dict[int, Callable[[Storage], None]] = {}
"""From each earlier version, what makes the next one of a dataset. Empty as long as there was only one."""

_PROPERTY = "braid.format_version"


class DatasetError(ValueError):
    """A dataset cannot be opened or used as asked. The message says what to do."""


def require_this_format(uri: str, properties: Mapping[str, str | None]) -> None:
    """Refuse a table of another format.

    Raises:
        DatasetError: the message says whether to migrate, to update, or that this is no dataset.
    """
    written = _written(properties)
    if written != FORMAT_VERSION:
        remedy = f"run `braid migrate {uri}`" if _has_way(written) else _no_way(written)
        raise DatasetError(f"{uri}: written in format {written}, this Braid reads {FORMAT_VERSION}; {remedy}")


def migrate(uri: str) -> tuple[int, int]:
    """Bring a dataset to this format. No job may run on it meanwhile.

    Returns:
        The format before and after.

    Raises:
        DatasetError: no dataset is here, or there is no way from its format to this one.
    """
    storage = Storage.of(uri)
    try:
        table = open_table(storage.below("shards"))
    except TableNotFoundError as error:
        raise DatasetError(f"{uri}: no token dataset here") from error
    written = _written(table.metadata().configuration)
    if not _has_way(written):
        raise DatasetError(f"{uri}: no way from format {written} to {FORMAT_VERSION}; {_no_way(written)}")
    for version in range(written, FORMAT_VERSION):
        STEPS[version](storage)
        table.alter.set_table_properties({_PROPERTY: str(version + 1)}, raise_if_not_exists=False)
    return written, FORMAT_VERSION


def _written(properties: Mapping[str, str | None]) -> int:
    return int(properties.get(_PROPERTY) or 0)


def _has_way(written: int) -> bool:
    return written <= FORMAT_VERSION and all(version in STEPS for version in range(written, FORMAT_VERSION))


def _no_way(written: int) -> str:
    return "update Braid" if written > FORMAT_VERSION else "it is no Braid dataset, or one of before 0.1"
