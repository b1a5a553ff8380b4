"""`braid sql`: any question in SQL over a dataset version, answered by DuckDB.

Enters: a dataset and a query. Leaves: a result as Arrow batches, and its printed forms. Always holds: shards are read through
their checksums and from wherever the dataset lies; DuckDB reads only the columns and row groups that the query needs, and
changes nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import fsspec
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.shards.dataset import Dataset
from pipelines.shards.reader import open_checked
from pipelines.shards.schema import SCHEMA
from pipelines.shards.writer import REJECT_SCHEMA

_BATCH_ROWS = 1024

_LONGEST_CELL = 120
"""Characters of a cell in a printed table."""

_SPANS = """
create view spans as
select row_id, source, ['text', 'image', 'audio'][span.modality + 1] as modality,
       span."start" as "start", span.length as length, span.rows as "rows", span.columns as "columns", span.uri as uri
from (select row_id, source, unnest(spans) as span from documents)
"""


class SqlError(ValueError):
    """A query that cannot be answered; the message says why."""


def ask(dataset: Dataset, query: str) -> pa.RecordBatchReader:
    """Answer a query.

    Raises:
        SqlError: DuckDB is not installed, or refuses the query.
        ShardError: what it reads is damaged.
    """
    try:
        import duckdb
    except ImportError as error:
        raise SqlError("braid sql needs DuckDB, which is not installed; run: pip install 'duckdb>=2'") from error
    connection = duckdb.connect()
    for name, table in _tables(dataset).items():
        connection.register(name, table)
    try:
        _documents(connection, dataset)
        connection.execute(_SPANS)
        return connection.sql(query).to_arrow_reader(_BATCH_ROWS)
    except duckdb.Error as error:
        raise SqlError(str(error)) from error


def _documents(connection: Any, dataset: Dataset) -> None:
    shards = dataset.shards()
    if not shards:
        connection.register("documents", SCHEMA.empty_table())
        return
    connection.register_filesystem(_Shards(dataset))
    files = ", ".join(f"'braid://{shard.name}'" for shard in shards)
    connection.execute(f"create view documents as select * from read_parquet([{files}])")


def _tables(dataset: Dataset) -> dict[str, pa.Table]:
    shards = dataset.shards()
    listed = {
        "name": [shard.name for shard in shards],
        "path": [shard.path for shard in shards],
        "bytes": pa.array([shard.size for shard in shards], pa.int64()),
        "documents": pa.array([shard.rows for shard in shards], pa.int64()),
    }
    rejects = pa.Table.from_pylist(dataset.quarantined(), schema=REJECT_SCHEMA)
    return {"shards": pa.table(listed), "quarantine": rejects}


class _Shards(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The shards of a dataset as a file system that is only read, and only through checksums."""

    protocol = "braid"
    cachable = False

    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self._storage = dataset.storage
        self._shards = {shard.name: shard for shard in dataset.shards()}

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> pa.NativeFile:
        if mode != "rb":
            raise PermissionError(f"{path}: shards are only read here")
        return open_checked(self._storage, self._name(path))[0]

    def info(self, path: str, **settings: Any) -> dict[str, Any]:
        return {"name": path, "size": self._shards[self._name(path)].size, "type": "file"}

    def glob(self, path: str, maxdepth: int | None = None, **settings: Any) -> list[str]:
        """Shards are named one by one, so each name is its own match."""
        return [path]

    def modified(self, path: str) -> datetime:
        """Shards never change."""
        return datetime.fromtimestamp(0, UTC)

    def _name(self, path: str) -> str:
        return path.rpartition("/")[2]


def print_table(result: pa.RecordBatchReader, console: Console, limit: int) -> None:
    """Print the first rows as a table."""
    table = Table(*map(escape, result.schema.names))
    for column, field in zip(table.columns, result.schema, strict=True):
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type):
            column.justify = "right"
    count, more = 0, False
    for batch in result:
        for row in batch.to_pylist():
            if count == limit:
                more = True
                break
            table.add_row(*(escape(_short(value)) for value in row.values()))
            count += 1
        if more:
            break
    console.print(table)
    if more:
        console.print(f"The first {limit:,} rows; --limit shows more, --format json or csv gives all.", style="dim")


def print_json(result: pa.RecordBatchReader, console: Console, limit: int) -> None:
    """Print all rows, one JSON object a line."""
    for batch in result:
        for row in batch.to_pylist():
            console.file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")


def print_csv(result: pa.RecordBatchReader, console: Console, limit: int) -> None:
    """Print all rows as CSV, with a header."""
    writer = csv.writer(console.file, lineterminator="\n")
    writer.writerow(result.schema.names)
    for batch in result:
        writer.writerows(row.values() for row in batch.to_pylist())


FORMATS: dict[str, Callable[[pa.RecordBatchReader, Console, int], None]] = {
    "table": print_table,
    "json": print_json,
    "csv": print_csv,
}


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST_CELL else f"{text[:_LONGEST_CELL]} ..."
