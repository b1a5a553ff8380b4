"""The dataset: what is committed is there once, what is not committed is not there."""

import json
import multiprocessing
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.documents import Reject
from pipelines.report.summary import summarize
from pipelines.sequence import VocabularyError
from pipelines.shards import dataset as dataset_module
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.digest import dataset_hash
from pipelines.shards.rollup import roll_up
from pipelines.shards.split import is_validation
from pipelines.shards.statistics import Statistics, length_bin, quantile
from tests.pipelines.corpora import VOCABULARY, make_dataset, random_row, write_unit


def test_a_shard_is_invisible_until_it_is_committed(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    shard = write_unit(dataset, "new", [random_row("n", np.random.default_rng(1))])
    assert Dataset.open(tmp_path / "d").statistics().documents == 7
    assert [w.unit for w in dataset.commit([shard])] == ["new"]
    assert Dataset.open(tmp_path / "d").statistics().documents == 8
    assert Dataset.open(tmp_path / "d", version=1).statistics().documents == 7


def test_a_unit_is_committed_once_whoever_finishes_it(tmp_path: Path) -> None:
    one = make_dataset(tmp_path / "d", units=0)
    rng = np.random.default_rng(2)
    rows = [random_row(f"r{i}", rng) for i in range(3)]
    first, second = write_unit(one, "u", rows), write_unit(one, "u", rows)
    other = Dataset.open(tmp_path / "d")
    assert len(one.commit([first])) == 1
    assert other.commit([second]) == []
    assert Dataset.open(tmp_path / "d").statistics().documents == 3


def _commit_all(folder: str, worker: int) -> int:
    dataset = Dataset.open(folder)
    committed = 0
    for unit in np.random.default_rng(worker).permutation(8):
        rows = [random_row(f"u{unit}r{i}", np.random.default_rng([int(unit), i])) for i in range(2)]
        committed += len(dataset.commit([write_unit(dataset, f"u{unit}", rows)]))
    return committed


def test_jobs_that_commit_the_same_units_at_once_leave_each_unit_once(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d", units=0)
    # "spawn", because deltalake's threads do not survive a fork.
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        committed = sum(pool.map(_commit_all, [str(tmp_path / "d")] * 4, range(4)))
    dataset = Dataset.open(tmp_path / "d")
    assert committed == 8
    assert Counter(shard.unit for shard in dataset.shards()) == Counter(f"u{unit}" for unit in range(8))
    ids = [row for batch in dataset.read(["row_id"]) for row in batch["row_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == dataset.statistics().documents == 16


def test_a_replaced_unit_leaves_in_the_commit_that_brings_its_successor(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=2)
    shard = write_unit(dataset, "u0new", [random_row("n", np.random.default_rng(1))])
    before = dataset.version
    ancestors = {"u0new": {"u0"}}

    def replaced(units: Collection[str]) -> set[str]:
        return set().union(*(ancestors.get(unit, set()) for unit in units))

    late = write_unit(dataset, "u0", [random_row("late", np.random.default_rng(2))])
    dataset.commit([shard], ancestors=replaced)
    assert dataset.version == before + 1
    assert [s.unit for s in dataset.shards()] == ["u0new", "u1"]
    assert dataset.statistics().documents == 8
    # A slower job still had the earlier state at work: it comes too late.
    assert dataset.commit([late], ancestors=replaced) == []


def test_statistics_are_those_of_their_version_when_commits_interleave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_dataset(tmp_path / "d", units=1)
    rng = np.random.default_rng(5)
    other = Dataset.open(tmp_path / "d")

    def after_another_commit(*arguments: Any) -> None:
        for unit in ("v1", "v2"):
            one.commit([write_unit(one, unit, [random_row(f"{unit}{i}", rng) for i in range(9)])])
        roll_up(*arguments)

    # `one` rolls up as always: only the slow job has the hook in its way.
    swapped = iter([after_another_commit])
    monkeypatch.setattr(dataset_module, "roll_up", lambda *arguments: next(swapped, roll_up)(*arguments))
    other.commit([write_unit(other, "w", [random_row(f"w{i}", rng) for i in range(2)])])
    for version, documents in {1: 7, 2: 9, 3: 18, 4: 27}.items():
        assert Dataset.open(tmp_path / "d", version).statistics().documents == documents


def test_the_hash_ignores_how_rows_were_cut_and_sees_every_row(tmp_path: Path) -> None:
    rows = [random_row(f"r{i}", np.random.default_rng(i)) for i in range(6)]
    cuts = {"a": [rows], "b": [rows[3:], rows[:3]], "c": [rows[:5]]}
    hashes = {}
    for name, parts in cuts.items():
        dataset = Dataset.create(tmp_path / name, VOCABULARY, validation_share=0.0)
        for index, part in enumerate(parts):
            dataset.commit([write_unit(dataset, f"u{index}", part)])
        hashes[name] = dataset_hash(dataset)
    assert hashes["a"] == hashes["b"] != hashes["c"]


def test_statistics_equal_what_duckdb_and_polars_count_in_the_files(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=4, rows=40)
    figures = summarize(dataset)
    files = [shard.path for shard in dataset.shards()]
    documents, total, text, image, audio, median, longest = duckdb.sql(
        "select count(*), sum(num_tokens), sum(num_text), sum(num_image), sum(num_audio), "
        f"quantile_disc(num_tokens, 0.5), max(num_tokens) from read_parquet({files})"
    ).fetchall()[0]
    assert figures["documents"] == documents == polars.read_parquet(files).height
    assert figures["tokens"] == {"text": text, "image": image, "audio": audio, "total": total}
    assert figures["document_tokens"]["0.5"] == median
    assert figures["document_tokens"]["1"] == longest
    frame = polars.read_parquet(files, columns=["token_ids", "modality_ids"]).explode("token_ids", "modality_ids")
    codes = frame.filter(polars.col("modality_ids") == 1)["token_ids"]
    assert figures["codebooks"]["image"]["used"] == codes.n_unique()
    sounds = frame.filter(polars.col("modality_ids") == 2)["token_ids"]
    assert figures["codebooks"]["audio 1"]["used"] == sounds.filter(sounds >= 16).n_unique()
    assert abs(figures["distinct_documents"] - documents) <= 0.05 * documents


def test_a_lost_roll_up_is_made_again_from_the_footers(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=3)
    expected = dataset.statistics().to_json()
    for name in dataset.storage.names("statistics")[1:]:
        (tmp_path / "d" / "statistics" / name).unlink()
    again = Dataset.open(tmp_path / "d").statistics().to_json()
    assert again == expected


def test_merged_statistics_equal_those_of_everything_at_once() -> None:
    rng = np.random.default_rng(3)
    rows = [random_row(f"r{i}", rng, source="ab"[i % 2]) for i in range(50)]
    whole, left, right = (Statistics.empty(VOCABULARY) for _ in range(3))
    whole.add(rows)
    left.add(rows[:13])
    right.add(rows[13:])
    right.merge(Statistics.from_json(json.loads(json.dumps(left.to_json()))))
    assert right.tokens() == whole.tokens()
    assert right.lengths == whole.lengths
    assert np.array_equal(right.audio_counts, whole.audio_counts)
    assert np.array_equal(right.distinct_registers, whole.distinct_registers)
    assert right.sources == whole.sources


def test_distinct_documents_are_estimated_within_five_percent() -> None:
    rng = np.random.default_rng(4)
    statistics = Statistics.empty(VOCABULARY)
    row = random_row("r", rng)
    hashes = [rng.bytes(16).hex() for _ in range(30_000)]
    statistics._add_distinct(hashes + hashes[:10_000])
    statistics.add([row])
    statistics.sources["stamps"].documents = 40_000
    assert abs(statistics.distinct_documents - 30_001) < 1500


def test_quantiles_are_those_of_the_sorted_values() -> None:
    values = np.random.default_rng(5).integers(1, 4096, 501)
    counts = Counter(length_bin(int(v)) for v in values)
    for q in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert quantile(counts, q) == np.quantile(values, q, method="inverted_cdf")
    assert length_bin(4097) == 4096
    assert 0 <= 1_000_003 - length_bin(1_000_003) <= 1_000_003 / 2048


def test_quarantine_is_seen_through_the_shards_that_were_committed(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=0)
    reject = Reject(source="s/a.png", position=0, reason="image: cannot be decoded", error="s/a.png: truncated")
    rows = [random_row("r", np.random.default_rng(0))]
    lost = write_unit(dataset, "u", rows, [reject])
    won = write_unit(dataset, "u", rows, [reject])
    dataset.commit([won])
    dataset.commit([lost])
    assert [r["error"] for r in dataset.quarantined()] == ["s/a.png: truncated"]
    assert summarize(dataset)["quarantine"] == {"image: cannot be decoded": 1}


def test_a_flipped_bit_in_a_shard_is_never_read_as_data(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1, rows=30)
    path = Path(dataset.shards()[0].path)
    good = path.read_bytes()
    expected = pq.read_table(path)
    rng = np.random.default_rng(6)
    for _ in range(400):
        data = bytearray(good)
        bit = int(rng.integers(8 * len(good)))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        try:
            read = [row for batch in dataset.read() for row in batch.to_pylist()]
        except Exception:  # whichever error the reader raises, it is loud
            continue
        assert read == expected.to_pylist()


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no token dataset here; make one with `braid tokenize"):
        Dataset.open(tmp_path / "nothing")
    make_dataset(tmp_path / "d", units=2)
    with pytest.raises(DatasetError, match="no version 9; it has versions 0 to 2"):
        Dataset.open(tmp_path / "d", version=9)


def test_a_dataset_with_another_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=0)
    with pytest.raises(VocabularyError, match="audio_codebooks: 2, 1"):
        dataset.vocabulary.require_same(VOCABULARY.first_codebooks(1), this="dataset", that="recipe")


def test_the_split_depends_on_the_source_alone_and_meets_its_share() -> None:
    held_out = [is_validation(f"s/{i}", 0.1) for i in range(5000)]
    assert 400 < sum(held_out) < 600
    assert held_out == [is_validation(f"s/{i}", 0.1) for i in range(5000)]
    assert all(is_validation(f"s/{i}", 0.2) for i in range(5000) if held_out[i])
