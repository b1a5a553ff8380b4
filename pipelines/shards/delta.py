"""Delta tables, wherever they lie: opened, made, and committed to by compare-and-swap.

Enters: a table's folder. Leaves: `deltalake` handles. Always holds: of several writers one makes the next version, and it
knows that it was the one, also where the answer to its commit was lost.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.corpus.errors import StoreError
from pipelines.shards.log import commit_name
from pipelines.shards.storage import Storage

Actions = Sequence[AddAction | RemoveAction]

_APP = "braid"
"""Application id of the commits' counter."""

_MARK = "braid.commit"
"""The field of a commit that says who made it: a word of chance."""

_TRIES = 20
"""Commits that may be lost against other jobs."""

_PROBES = 4
"""Writers that try to make the same version of a probe."""


T = TypeVar("T")


def open_table(folder: Storage, version: int | None = None) -> DeltaTable:
    return _tried(folder, lambda: DeltaTable(folder.uri, version=version, storage_options=folder.delta_options))


def is_table(folder: Storage) -> bool:
    return bool(_tried(folder, lambda: DeltaTable.is_deltatable(folder.uri, storage_options=folder.delta_options)))


def create_table(folder: Storage, schema: pa.Schema, **settings: Any) -> DeltaTable:
    """Make a table; fails if there is one."""
    mark = uuid.uuid4().hex
    properties = CommitProperties(custom_metadata={_MARK: mark}, max_commit_retries=0)

    def attempt() -> DeltaTable:
        options = folder.delta_options
        try:
            return DeltaTable.create(
                folder.uri, schema, storage_options=options, commit_properties=properties, **settings
            )
        except (DeltaError, OSError):
            # The store may have done it, but its answer was lost; then a second try lost against the first.
            if mark not in _text(folder, commit_name(0)):
                raise
            return DeltaTable(folder.uri, version=0, storage_options=options)

    return _tried(folder, attempt)


def ensure_table(folder: Storage, schema: pa.Schema) -> None:
    """Make a table if there is none."""
    if is_table(folder):
        return
    try:
        create_table(folder, schema)
    except DeltaError:
        # Another job may have made it just now.
        if not is_table(folder):
            raise


def update(folder: Storage, table: DeltaTable) -> None:
    """Move a handle on to the newest version."""
    _tried(folder, table.update_incremental)


def append(folder: Storage, table: DeltaTable, actions: Actions, schema: pa.Schema) -> None:
    """Add and remove files, whatever other jobs commit meanwhile."""
    for attempt in range(_TRIES):
        update(folder, table)
        if swap(folder, table, actions, schema):
            return
        time.sleep(0.05 * attempt)
    raise StoreError(f"{folder.uri}: {_TRIES} commits in a row lost against other jobs; run it again later")


def swap(folder: Storage, table: DeltaTable, actions: Actions, schema: pa.Schema, *, keep_log: bool = False) -> bool:
    """Make the version after this handle's; False if another job has made it. The handle stays where it was.

    Args:
        keep_log: whether the log of old versions stays for ever; by default deltalake may drop it after 30 days.
    """
    mark = uuid.uuid4().hex
    hooks = PostCommitHookProperties(cleanup_expired_logs=False) if keep_log else None
    commit = commit_name(table.version() + 1)

    def attempt() -> bool:
        counter = (table.transaction_version(_APP) or 0) + 1
        properties = CommitProperties(
            custom_metadata={_MARK: mark}, app_transactions=[Transaction(_APP, counter)], max_commit_retries=0
        )
        try:
            table.create_write_transaction(
                list(actions), "append", schema, commit_properties=properties, post_commithook_properties=hooks
            )
        except (DeltaError, OSError) as error:
            # The store may have done it, but its answer was lost; then a second try lost against the first.
            text = _text(folder, commit)
            if text or isinstance(error, CommitFailedError):
                return mark in text
            raise
        return True

    return _tried(folder, attempt)


def require_compare_and_swap(dataset: Storage) -> None:
    """Refuse an object store that would let one job's commit overwrite another's.

    Raises:
        StoreError: the store takes a PUT with the condition that nothing lies there, and overwrites what lies there.
    """
    if dataset.is_local:
        return
    probe, schema = dataset.below(f"probe-{uuid.uuid4().hex}"), pa.schema([pa.field("id", pa.int64())])
    try:
        create_table(probe, schema)
        writers = [open_table(probe) for _ in range(_PROBES)]
        # At once, because deltalake looks before it writes: the condition is what decides between those that looked at once.
        start = Barrier(_PROBES)

        def write(table: DeltaTable) -> bool:
            start.wait()
            return swap(probe, table, [], schema)

        with ThreadPoolExecutor(_PROBES) as pool:
            won = sum(pool.map(write, writers))
    finally:
        dataset.tried(lambda: dataset.filesystem.delete_dir(probe.root))
    if won != 1:
        raise StoreError(
            f"{dataset.uri}: this store ignores `If-None-Match: *`, so two jobs could overwrite each other's commits; "
            "name another store or a local disk for the dataset, or update the store: see docs/storage.md"
        )


def _text(folder: Storage, commit: str) -> str:
    """What a commit says; nothing if there is none."""
    return folder.read(commit).decode() if folder.exists(commit) else ""


def _tried(folder: Storage, attempt: Callable[[], T]) -> T:
    def translated() -> T:
        try:
            return attempt()
        except DeltaError as error:
            # Most of what a store says comes as OSError, and some as deltalake's own.
            if "object store" in str(error):
                raise OSError(str(error)) from error
            raise

    return folder.tried(translated)
