"""Open a committed shard so that no flipped bit of it is ever taken for data.

A shard's file name ends in the CRC-32 of its footer, and the footer holds one of each column chunk. Every reader opens
shards here.
"""

from __future__ import annotations

import zlib

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.checksums import KEY, CheckedFile, ShardError
from pipelines.shards.storage import Storage

__all__ = ["ShardError", "footer_checksum", "open_checked", "open_shard", "read_footer"]

_TAIL = 8
"""A Parquet file ends in the footer's length (4 bytes, little-endian) and `PAR1`."""


def footer_checksum(tail: bytes) -> str:
    """CRC-32 of a footer as 8 hexadecimal digits, from a file's last bytes.

    Args:
        tail: the end of the file, at least the whole footer and the 8 bytes behind it.
    """
    length = int.from_bytes(tail[-_TAIL:-4], "little")
    return f"{zlib.crc32(tail[-_TAIL - length :]):08x}"


def open_shard(dataset: Storage, name: str) -> pq.ParquetFile:
    """Open a shard of a dataset, its footer checked now and its chunks as they are read.

    Raises:
        ShardError: the footer is not the one that was written; the message names file and remedy.
    """
    source, metadata = open_checked(dataset, name)
    # A shard without rows, or one of before there were checksums of chunks, has at least those of its pages.
    return pq.ParquetFile(source, metadata=metadata, page_checksum_verification=not _has_chunks(metadata))


def open_checked(dataset: Storage, name: str) -> tuple[pa.NativeFile, pq.FileMetaData]:
    """The bytes of a shard, which check themselves as they are read, and its footer.

    Raises:
        ShardError: as `open_shard`.
    """
    path = dataset.path(f"shards/{name}")
    source = dataset.open(f"shards/{name}")
    try:
        size = source.size()
        length = int.from_bytes(source.read_at(_TAIL, max(size - _TAIL, 0))[:4], "little")
        tail = source.read_at(length + _TAIL, size - length - _TAIL) if length + _TAIL <= size else b""
        if len(tail) < _TAIL or footer_checksum(tail) != name.removesuffix(".parquet").rpartition("-")[2]:
            raise ShardError(
                f"{path}: the footer is damaged (its checksum is not the one in the file's name); restore the file from "
                "a copy, or remove it from the dataset and tokenize its inputs again"
            )
        metadata = pq.read_metadata(pa.BufferReader(tail))
        if not _has_chunks(metadata):
            source.seek(0)
            return source, metadata
        return pa.PythonFile(CheckedFile(source, path, metadata), mode="r"), metadata
    except BaseException:
        source.close()
        raise


def _has_chunks(metadata: pq.FileMetaData) -> bool:
    """Whether the footer has a checksum of each column chunk."""
    return KEY.encode() in (metadata.metadata or {})


def read_footer(dataset: Storage, name: str) -> dict[str, str]:
    """The `braid.` entries of a shard's footer, without the prefix."""
    with open_shard(dataset, name) as file:
        metadata = file.metadata.metadata or {}
    prefix = b"braid."
    return {k.removeprefix(prefix).decode(): v.decode() for k, v in metadata.items() if k.startswith(prefix)}
