"""A shard whose row groups are compressed and written on a thread while more rows are added."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.shards import writer
from pipelines.shards.schema import Row, to_arrow
from pipelines.shards.statistics import Statistics
from pipelines.shards.storage import DiskFullError, Storage
from pipelines.shards.writer import ShardWriter
from tests.pipelines.corpora import VOCABULARY, random_row
from tests.pipelines.disks import small_disk


def some_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [random_row(f"r{index:04}", rng) for index in range(count)]


def writing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("braid-write")]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("piece_tokens", [1, 150, 2**17])
def test_rows_row_groups_and_statistics_are_those_of_writing_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool, piece_tokens: int
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_TOKENS", 500)
    monkeypatch.setattr(writer, "_PIECE_TOKENS", piece_tokens)
    rows = some_rows(40)
    with ShardWriter(Storage.of(str(tmp_path)), VOCABULARY, "u", {"rows": []}, beside=beside) as shard:
        for row in rows:
            shard.add(row)
        written = shard.finish()
    expected: list[int] = []
    tokens = 500
    for row in rows:
        if tokens >= 500:
            expected.append(0)
            tokens = 0
        expected[-1] += 1
        tokens += len(row.sequence.token_ids)
    file = pq.ParquetFile(tmp_path / "shards" / written.name)
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == expected
    assert file.read().combine_chunks().to_batches() == [to_arrow(rows)]
    counted = Statistics.empty(VOCABULARY)
    counted.add(rows)
    assert written.statistics == counted.to_json()
    assert written.rows == 40
    assert writing_threads() == []


def write_beside(folder: Path, rows: Iterable[Row]) -> None:
    with ShardWriter(Storage.of(str(folder)), VOCABULARY, "u", {"rows": []}, beside=True) as shard:
        for row in rows:
            shard.add(row)


def test_a_disk_that_fills_up_while_it_is_written_beside_ends_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_TOKENS", 5000)
    with small_disk(tmp_path / "disk", 200_000) as disk:
        with pytest.raises(DiskFullError, match="the disk is full"):
            write_beside(disk, some_rows(200) * 50)
        assert list((disk / "shards").iterdir()) == []
    assert writing_threads() == []


def test_a_caller_that_fails_leaves_neither_thread_nor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Iterator[Row]:
        yield from some_rows(40)
        raise KeyError("the caller's own")

    monkeypatch.setattr(writer, "ROW_GROUP_TOKENS", 500)
    with pytest.raises(KeyError, match="the caller's own"):
        write_beside(tmp_path, failing())
    assert list((tmp_path / "shards").iterdir()) == []
    assert writing_threads() == []
