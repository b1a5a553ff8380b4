"""`braid verify` finds whatever is wrong with a dataset, and nothing where all is well."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.shards.dataset import Dataset
from pipelines.shards.verify import verify
from tests.pipelines.corpora import VOCABULARY, make_dataset, random_row, write_unit


def test_a_good_dataset_has_no_fault(tmp_path: Path) -> None:
    assert list(verify(make_dataset(tmp_path / "d"))) == []


def test_each_kind_of_fault_is_named_with_its_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    rng = np.random.default_rng(1)
    broken = random_row("broken", rng)
    broken.sequence.token_ids[-1] = 3
    moved = random_row("moved", rng)
    spans = [replace(moved.sequence.spans[0], start=9), *moved.sequence.spans[1:]]
    moved = replace(moved, sequence=replace(moved.sequence, spans=spans))
    dataset.commit([write_unit(dataset, "new", [broken, moved, random_row("0x1", rng)])])
    found = {fault.row: fault.what for fault in verify(dataset)}
    assert set(found) == {"broken", "moved", "0x1"}
    assert "the document stops before <|end|>" in found["broken"]
    assert "spans" in found["moved"]
    assert "occurs twice, first in" in found["0x1"]


def test_no_flipped_bit_escapes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2, rows=30)
    path = Path(dataset.shards()[0].path)
    good = path.read_bytes()
    rng = np.random.default_rng(2)
    rows = [row for batch in dataset.read() for row in batch.to_pylist()]
    for _ in range(60):
        data = bytearray(good)
        bit = int(rng.integers(8 * len(good)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        faults = list(verify(dataset))
        # A bit that no reader looks at, such as padding, may go unnoticed; then the rows are the same.
        assert faults or [row for batch in dataset.read() for row in batch.to_pylist()] == rows


def test_a_missing_shard_and_another_vocabulary_are_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2)
    Path(dataset.shards()[0].path).unlink()
    (fault,) = verify(dataset)
    assert fault.shard == dataset.shards()[0].name
    other = Dataset.create(tmp_path / "e", replace(VOCABULARY, text_sha256="another"), validation_share=0.0)
    other.vocabulary = VOCABULARY
    shard = write_unit(other, "u", [random_row("r", np.random.default_rng(0))])
    other.commit([shard])
    faults = [fault.what for fault in verify(Dataset.open(tmp_path / "e"))]
    assert faults[0] == "made with another vocabulary than the dataset's"
