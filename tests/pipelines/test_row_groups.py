"""Rows of Parquet files: each exactly once however a file is divided, and damage named where it lies."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.errors import RecordError
from pipelines.corpus.row_groups import rows

VALUES = [
    {"n": n, "text": f"row {n}", "ids": list(range(n % 5)), "deep": [{"a": [[n]], "b": None}], "bytes": bytes([n])}
    for n in range(60)
]


@cache
def table(row_group_size: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(VALUES), sink, row_group_size=row_group_size, write_page_checksum=True)
    return sink.getvalue()


def read(data: bytes, start: int = 0, stop: int = sys.maxsize, **changes: Any) -> list[tuple[int, Any]]:
    arguments = {"columns": set(VALUES[0]), "max_row_group_mb": 100} | changes
    return list(rows(io.BytesIO(data), start, stop, **arguments))


def plain(value: Any) -> Any:
    """With arrays as lists."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | np.ndarray) else value


@settings(max_examples=40, deadline=None)
@given(row_group_size=st.sampled_from([1, 7, 60]), cuts=st.lists(st.integers(0, 100_000), max_size=6))
def test_any_division_of_a_file_gives_every_row_once_in_order(row_group_size: int, cuts: list[int]) -> None:
    data = table(row_group_size)
    borders = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    got = [item for start, stop in pairwise(borders) for item in read(data, start, stop)]
    assert [number for number, _ in got] == list(range(60))
    assert [plain(row) for _, row in got] == VALUES


def test_lists_of_whole_numbers_stay_arrays_and_what_is_not_asked_for_is_not_read() -> None:
    row = read(table(7), columns={"ids", "absent"})[4][1]
    assert list(row) == ["ids"]
    assert isinstance(row["ids"], np.ndarray)
    assert row["ids"].tolist() == [0, 1, 2, 3]


def test_nothing_that_is_flipped_comes_through_as_a_row() -> None:
    data = table(7)
    rng = np.random.default_rng(0)
    damaged = 0
    for at in rng.integers(4, pq.read_metadata(io.BytesIO(data)).row_group(7).column(0).data_page_offset, 40):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        for number, row in read(bytes(flipped)):
            if isinstance(row, RecordError):
                assert row.reason == "parquet: damaged"
                damaged += 1
            else:
                assert plain(row) == VALUES[number]
    assert damaged > 20


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table at all", table(7)[:-20], table(7)[:500]])
def test_what_is_no_whole_file_is_named_once_whatever_its_slices(data: bytes) -> None:
    borders = [0, 100, 200, 1000]
    ((number, error),) = [item for start, stop in pairwise(borders) for item in read(data, start, stop)]
    assert (number, error.reason) == (0, "parquet: damaged")
    assert "no whole Parquet file" in str(error)


def test_a_damaged_row_group_costs_no_other() -> None:
    data = bytearray(table(7))
    at = pq.read_metadata(io.BytesIO(data)).row_group(2).column(1).data_page_offset
    data[at + 40 : at + 60] = bytes(20)
    got = read(bytes(data))
    assert [number for number, row in got if isinstance(row, RecordError)] == [14]
    assert [number for number, row in got if isinstance(row, dict)] == [n for n in range(60) if not 14 <= n < 21]


def test_a_text_that_is_not_utf8_costs_its_row_alone() -> None:
    sink = io.BytesIO()
    texts = pa.array([b"one", b"caf\xe9", b"three"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), sink)
    one, bad, three = (row for _, row in read(sink.getvalue(), columns={"text"}))
    assert (one, three) == ({"text": "one"}, {"text": "three"})
    assert bad.reason == "text: not UTF-8"


def test_a_row_group_over_the_limit_is_not_read() -> None:
    got = read(table(7), max_row_group_mb=1e-4)
    assert [number for number, _ in got] == list(range(0, 60, 7))
    assert {row.reason for _, row in got} == {"parquet: row group too large"}
    assert "the 7 rows of row group 0 take" in str(got[0][1])


def measured(file: Path) -> tuple[int, int]:
    """Bytes that the column `data` has in all, and kilobytes of memory that reading it takes."""
    code = (
        "import sys; from tests.peak import peak_kb; from pipelines.corpus.row_groups import rows;"
        "file = open(sys.argv[1], 'rb');"
        "before = peak_kb();"
        "count = sum(len(row['data']) for _, row in rows(file, 0, 10**12, {'data'}, 1000));"
        "after = peak_kb();"
        "print(count, after - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    return count, kilobytes


def test_a_value_that_all_rows_share_is_in_memory_once(tmp_path: Path) -> None:
    """A file of some kilobytes that is gigabytes if each row gets its own."""
    cell = b"x" * 2_000_000
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([cell, b"y"]))
    kind = pa.struct([("data", cells.type)])
    for name, column in (("data", cells), ("in", pa.StructArray.from_arrays([cells], fields=list(kind)))):
        pq.write_table(pa.table({name: column}), tmp_path / "x.parquet", compression="zstd", store_schema=False)
        assert (tmp_path / "x.parquet").stat().st_size < 10_000
        if name == "data":
            count, kilobytes = measured(tmp_path / "x.parquet")
            assert count == 3000 * len(cell)
            assert kilobytes < 75_000, kilobytes
        else:
            with (tmp_path / "x.parquet").open("rb") as file:
                assert next(rows(file, 0, sys.maxsize, {"in"}, 100)) == (0, {"in": {"data": cell}})


def test_memory_holds_a_batch_and_not_the_row_group(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    cell = np.random.default_rng(0).bytes(1_000_000)
    with pq.ParquetWriter(file, pa.schema([("data", pa.binary())]), write_batch_size=1) as writer:
        writer.write_table(pa.table({"data": [cell] * 150}), row_group_size=150)
    count, kilobytes = measured(file)
    assert count == 150_000_000
    assert kilobytes < 75_000
