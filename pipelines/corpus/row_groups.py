"""Rows of Parquet files, read by byte range.

Enters: an open file and a range. Leaves: the rows of the row groups whose first byte lies in the range, each with its
number in the file. Always holds: any division of a file gives each row exactly once, in order; and memory holds a batch
of rows of about 8 MB, or one row where that is larger, beside one page and the dictionary of each column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus.errors import RecordError

_BATCH_BYTES = 8 * 2**20
_BATCH_ROWS = 1024
_DICTIONARY_PAGE = 2
_BUFFER = 2**20


def rows(
    file: BinaryIO, start: int, stop: int, columns: Collection[str], max_row_group_mb: float
) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """The rows of the row groups that begin in [start, stop), with their numbers in the file.

    Args:
        columns: those to read, as far as the file has them.
        max_row_group_mb: larger row groups, counted over these columns unpacked, are not read.

    Returns:
        Each row as column names and Python values, lists of whole numbers as numpy arrays; or, in place of what cannot be
        read, what is wrong with it: under the number of the first row concerned, and in the range in which it begins.

    Raises:
        FileNotFoundError, PermissionError: the file is gone, or refused.
    """
    try:
        table = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, pa.ArrowException) as error:
        if start == 0:
            yield 0, RecordError("parquet: damaged", f"no whole Parquet file: {_line(error)}; fetch or write it again")
        return
    named = [name for name in table.schema_arrow.names if name in columns]
    number = begin = 0
    for index in range(table.num_row_groups):
        group = table.metadata.row_group(index)
        chunks = [group.column(i) for i in range(group.num_columns)]
        # Never before the group in front, so that the ranges give the groups in their order whatever the writer did.
        begin = max(begin, min((_offset(chunk) for chunk in chunks), default=begin))
        if start <= begin < stop:
            wanted = [c for c in chunks if c.path_in_schema.partition(".")[0] in named]
            size = sum(c.total_uncompressed_size for c in wanted)
            if size > max_row_group_mb * 1e6:
                yield (
                    number,
                    RecordError(
                        "parquet: row group too large",
                        f"the {group.num_rows} rows of row group {index} take {size / 1e6:,.0f} MB, over max_row_group_mb = "
                        f"{max_row_group_mb:g}; write the file with smaller row groups or raise that limit",
                    ),
                )
            else:
                # Values of a dictionary are shared in the file, but each row gets a copy: 10 kB became 5 GB.
                shared = max((_shared(file, chunk, group.num_rows) for chunk in wanted), default=0)
                row = max(size // max(group.num_rows, 1), shared, 1)
                yield from _group_rows(table, index, number, named, max(1, min(_BATCH_ROWS, _BATCH_BYTES // row)))
        number += group.num_rows


def _group_rows(
    table: pq.ParquetFile, index: int, number: int, columns: list[str], batch_size: int
) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    try:
        for batch in table.iter_batches(batch_size, row_groups=[index], columns=columns, use_threads=False):
            for i in range(batch.num_rows):
                yield number, _row(batch, i)
                number += 1
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, pa.ArrowException) as error:
        yield (
            number,
            RecordError(
                "parquet: damaged",
                f"the rest of row group {index} cannot be read: {_line(error)}; fetch or write the file again",
            ),
        )


def _row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | RecordError:
    try:
        return {name: _plain(batch.column(i)[index]) for i, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError as error:
        return RecordError("text: not UTF-8", f"a text that is not UTF-8 at its byte {error.start}; write it as UTF-8")


def _plain(scalar: pa.Scalar) -> Any:
    """A Python value; lists of whole numbers stay arrays, as ids come by the million."""
    if isinstance(scalar, pa.ListScalar) and scalar.values is not None:
        values = scalar.values
        if pa.types.is_integer(values.type) and not values.null_count:
            return values.to_numpy()
        return [_plain(value) for value in values]
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid:
        return {name: _plain(scalar[name]) for name in scalar}
    return scalar.as_py()


def _offset(chunk: pq.ColumnChunkMetaData) -> int:
    """Where a column of a row group begins."""
    first = chunk.dictionary_page_offset
    return int(chunk.data_page_offset if first is None else min(first, chunk.data_page_offset))


def _shared(file: BinaryIO, chunk: pq.ColumnChunkMetaData, rows: int) -> int:
    """The most bytes that a row may have of a column's dictionary, 0 where there is none."""
    file.seek(_offset(chunk))
    header = iter(file.read(16))
    try:
        # Thrift's compact protocol: field 1 is the page's type, field 2 its size unpacked, both int32.
        kind, size = (_number(header) for _ in range(2))
    except StopIteration:
        return 0
    return size * -(-chunk.num_values // max(rows, 1)) if kind == _DICTIONARY_PAGE else 0


def _number(header: Iterator[int]) -> int:
    """The next field of a header: a byte for its id and type, then seven bits of a number a byte, the lowest its sign."""
    next(header)
    number = shift = 0
    for byte in header:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number >> 1


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
