"""Single flipped bits anywhere in a shard: none is silent, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.loading import Index, Loader
from pipelines.shards.dataset import Dataset
from pipelines.shards.reader import ShardError
from pipelines.shards.verify import verify
from tests.pipelines.corpora import make_dataset

FLIPS = 240
MAGIC = 4
"""Bytes at the beginning of a Parquet file that say that it is one, and that no reader looks at."""


def rows(dataset: Dataset) -> list[dict[str, Any]]:
    return [row for batch in dataset.read() for row in batch.to_pylist()]


def sequences(dataset: Dataset) -> list[list[int]]:
    """One epoch of training on it."""
    index = Index.build(dataset, 128).split(validation=False)
    loader = Loader(index, sequences=2, micro_batch=2, seed=1, window_tokens=2000, endless=False, prefetch=0)
    return [row for step in loader for batch in step.micro_batches for row in batch.token_ids.tolist()]


WAYS: dict[str, Callable[[Dataset], list[Any]]] = {"reading": rows, "loader": sequences}


@pytest.mark.slow
def test_no_flipped_bit_is_silent_in_verify_in_reading_or_in_training(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=60)
    expected = {name: way(dataset) for name, way in WAYS.items()}
    rng = np.random.default_rng(20)
    noticed = dict.fromkeys(["verify", *WAYS], 0)
    for turn in range(FLIPS):
        path = Path(dataset.shards()[turn % 2].path)
        good = path.read_bytes()
        # Every byte is as likely as any other, and the first few are hit for certain.
        bit = turn * 8 if turn < MAGIC else int(rng.integers(8 * len(good)))
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        damaged = Dataset.open(tmp_path / "d")
        faults = list(verify(damaged))
        assert faults or bit // 8 < MAGIC, f"bit {bit} of {path.name}"
        assert all(fault.shard == path.name for fault in faults)
        noticed["verify"] += bool(faults)
        for name, way in WAYS.items():
            try:
                assert way(damaged) == expected[name], f"{name}: bit {bit} of {path.name}"
            except ShardError as error:
                noticed[name] += str(path) in str(error)
            except (OSError, pa.ArrowException):
                noticed[name] += 1
        path.write_bytes(good)
    # Training does not look at all columns; where it noticed nothing, its batches were the same.
    assert noticed["verify"] == noticed["reading"] == FLIPS - MAGIC
    assert noticed["loader"] > FLIPS / 2
    assert list(verify(Dataset.open(tmp_path / "d"))) == []
