"""Datasets in an object store: each commit is there once, through whatever the network does."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from deltalake.exceptions import DeltaError

from pipelines.corpus import remote
from pipelines.corpus.documents import Document, Input, Reject, Slice
from pipelines.corpus.errors import StoreError, TransientError
from pipelines.corpus.tokenized import TokenizedSource
from pipelines.loading.index import Index
from pipelines.loading.loader import Loader
from pipelines.shards.dataset import Dataset
from pipelines.shards.delta import ensure_table, is_table
from pipelines.shards.digest import dataset_hash
from pipelines.shards.schema import SCHEMA
from pipelines.shards.storage import Storage
from pipelines.shards.vacuum import vacuum
from pipelines.shards.verify import verify
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.units import WorkUnit
from tests.faults import AFTER, KINDS, FaultyS3
from tests.pipelines.corpora import VOCABULARY, make_dataset, random_row, write_unit
from tests.pipelines.reading import everything
from tests.pipelines.stores import object_store

FIRST = [kind if kind == "reset after" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
"""Of all kinds, in the quick tests, the one that is the hardest."""

SOME = [kind for kind in KINDS if kind != "delay"]
"""Faults that cost no time."""


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with object_store() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_FIRST_PAUSE_S", 0.02)
        yield server


@pytest.fixture
def s3(server: FaultyS3) -> FaultyS3:
    server.plan()
    return server


@pytest.mark.parametrize("kind", FIRST)
def test_a_file_is_written_whole_through_every_kind_of_fault(kind: str, s3: FaultyS3, tmp_path: Path) -> None:
    storage = Storage.of(f"s3://bucket/files/{kind}/")
    large = np.random.default_rng(0).bytes(11_000_000)
    s3.plan(rate=0.5, kinds=[kind], seed=2, first=1)
    storage.write("small", b"a fox")
    (tmp_path / "large").write_bytes(large)
    storage.upload(tmp_path / "large", "large")
    assert (storage.read("small"), storage.read("large")) == (b"a fox", large)
    assert not (tmp_path / "large").exists()
    assert storage.names() == ["large", "small"]
    storage.delete("small")
    storage.delete("small")
    assert storage.names() == ["large"]
    assert any(fault == kind for _, fault in s3.log())


@pytest.mark.parametrize("kind", AFTER)
def test_an_upload_that_fails_sends_nothing_after_it_that_could_empty_the_file(
    kind: str, s3: FaultyS3, tmp_path: Path
) -> None:
    """A request that is given up may still be carried out, after the next attempt has succeeded."""
    (tmp_path / "shard").write_bytes(bytes(range(256)) * 20)
    s3.plan(rate=1.0, kinds=[kind], first=4, only="PUT .*/shard")
    Storage.of(f"s3://bucket/uploads/{kind}").upload(tmp_path / "shard", "shard")
    puts = [size for request, size in s3.sent() if request.startswith("PUT")]
    assert len(puts) > 4
    assert min(puts) >= 256 * 20


@pytest.mark.parametrize("kind", FIRST)
def test_a_commit_whose_answer_is_lost_is_there_once_and_known_as_one_s_own(kind: str, s3: FaultyS3) -> None:
    dataset = Dataset.create(f"s3://bucket/commits/{kind}", VOCABULARY, validation_share=0.2)
    reject = Reject(source="s/a.png", position=0, reason="image: damaged", error="s/a.png: truncated")
    s3.plan(rate=1.0, kinds=[kind], first=1, only="PUT .*_delta_log|GET .*_delta_log/0+[12].json")
    for unit in ("u0", "u1"):
        row = random_row(f"{unit}r", np.random.default_rng(1))
        assert [w.unit for w in dataset.commit([write_unit(dataset, unit, [row], [reject])])] == [unit]
    assert {fault for _, fault in s3.log()} == {"", kind}
    s3.plan()
    fresh = Dataset.open(dataset.uri)
    assert [shard.unit for shard in fresh.shards()] == ["u0", "u1"]
    assert (fresh.version, fresh.statistics().documents, fresh.rejects()) == (2, 2, 2)
    assert len(dataset.storage.names("statistics")) == 2
    assert list(verify(fresh)) == []


@pytest.mark.parametrize("kind", AFTER)
def test_a_dataset_whose_creation_was_answered_to_nobody_is_made(kind: str, s3: FaultyS3) -> None:
    """Each table's first commit is done, and its answer lost: each finds that it was its own."""
    uri = f"s3://bucket/creations/{kind}"
    s3.plan(rate=1.0, kinds=[kind], first=1, only="PUT .*_delta_log/0+.json")
    assert Dataset.create(uri, VOCABULARY, validation_share=0.2).version == 0
    s3.plan()
    with pytest.raises(DeltaError, match="already exists"):
        Dataset.create(uri, VOCABULARY, validation_share=0.2)


@pytest.mark.parametrize("kind", AFTER)
def test_a_ledger_entry_whose_answer_is_lost_keeps_its_file(kind: str, s3: FaultyS3) -> None:
    storage = Storage.of(f"s3://bucket/ledgers/{kind}")
    item = Input(uri="a", size=1, etag="1", parts=("s3://bucket/a",))
    unit = WorkUnit(source="s", slices=(Slice(input=item, start=0, stop=1),))
    ledger = Ledger(storage)
    s3.plan(rate=1.0, kinds=[kind], first=1, only="PUT .*_delta_log")
    assert ledger.append([unit])
    assert Ledger(storage).units([unit.id]) == [unit]


def test_a_dataset_in_a_store_is_read_as_a_source_of_another(s3: FaultyS3) -> None:
    """Through the same settings as all else, an endpoint without encryption among them, and through faults."""
    dataset = make_dataset("s3://bucket/source", units=2, rows=3)  # type: ignore[arg-type]
    made_with = {"fingerprint": VOCABULARY.fingerprint}
    settings = {"reader": "tokenized", "name": "ids", "content": "sequences", "made_with": made_with}
    source = TokenizedSource.model_validate(settings | {"path": dataset.uri}).bound(VOCABULARY, 128)
    s3.plan(rate=0.2, kinds=SOME, seed=3)
    assert [item.uri for item in source.inputs()] == [shard.name for shard in dataset.shards()]
    assert sum(isinstance(item, Document) for item in everything(source)) == 6


def _commit_all(uri: str, worker: int) -> int:
    dataset = Dataset.open(uri)
    committed = 0
    for unit in np.random.default_rng(worker).permutation(6):
        rows = [random_row(f"u{unit}r{i}", np.random.default_rng([int(unit), i])) for i in range(2)]
        committed += len(dataset.commit([write_unit(dataset, f"u{unit}", rows)]))
    return committed


@pytest.mark.slow
def test_processes_that_commit_the_same_units_at_once_leave_each_unit_once(s3: FaultyS3) -> None:
    dataset = Dataset.create("s3://bucket/race", VOCABULARY, validation_share=0.2)
    s3.plan(rate=0.04, kinds=SOME, seed=5)
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        committed = sum(pool.map(_commit_all, [dataset.uri] * 3, range(3)))
    assert {fault for _, fault in s3.log()} > {"500", "reset"}
    s3.plan()
    dataset.refresh()
    assert Counter(shard.unit for shard in dataset.shards()) == Counter(f"u{unit}" for unit in range(6))
    assert committed == 6
    assert dataset.statistics().documents == 12
    assert list(verify(dataset)) == []


def test_a_store_that_overwrites_in_spite_of_the_condition_is_refused(s3: FaultyS3) -> None:
    s3.plan(ignore_conditions=True)
    with pytest.raises(StoreError, match="this store ignores `If-None-Match"):
        Dataset.create("s3://bucket/unsafe", VOCABULARY, validation_share=0.2)
    assert not Dataset.exists("s3://bucket/unsafe")
    assert not [item for item in remote.listing("s3://bucket/unsafe") if item.stamp[0]]


def test_a_store_that_is_down_or_refuses_ends_in_a_clear_error(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TRIES", 2)
    dataset = Dataset.create("s3://bucket/down", VOCABULARY, validation_share=0.2)
    shard = write_unit(dataset, "u", [random_row("r", np.random.default_rng(1))])
    s3.down()
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"s3://bucket/down/shards: failed 2 times .* 503 Service Unavailable"):
        Dataset.open("s3://bucket/down")
    with pytest.raises(TransientError, match=r"s3://bucket/down.*failed 2 times"):
        dataset.commit([shard])
    assert time.monotonic() - began < 60
    s3.plan(rate=1.0, kinds=["403"])
    with pytest.raises(StoreError, match=r"the store refuses .* see docs/storage.md"):
        Dataset.open("s3://bucket/down")
    s3.plan()
    with pytest.raises(StoreError, match=r"s3://nobucket/d.*: no such bucket"):
        Dataset.create("s3://nobucket/d", VOCABULARY, validation_share=0.2)


def test_a_table_that_two_make_at_once_is_one(s3: FaultyS3) -> None:
    """The answer to the first job's creation is lost: it finds its own table, and takes it."""
    folder = Storage.of("s3://bucket/made/twice")
    s3.plan(rate=1.0, kinds=["reset after"], first=1, only="PUT .*_delta_log")
    ensure_table(folder, SCHEMA)
    assert is_table(folder)


def test_batches_from_a_store_are_those_from_a_disk(s3: FaultyS3, tmp_path: Path) -> None:
    batches = []
    for uri in (str(tmp_path / "d"), "s3://bucket/loaded"):
        dataset = make_dataset(uri, units=2, rows=20)  # type: ignore[arg-type]
        s3.plan(rate=0.1, kinds=SOME, seed=1)
        loader = Loader(
            Index.build(dataset, 128), sequences=4, micro_batch=2, seed=0, window_tokens=1000, endless=False, prefetch=0
        )
        batches.append([micro.token_ids.tolist() for step in loader for micro in step.micro_batches])
        s3.plan()
    assert batches[0] == batches[1]
    assert dataset_hash(Dataset.open(tmp_path / "d")) == dataset_hash(dataset)


@pytest.mark.slow
def test_a_vacuum_takes_the_orphans_of_a_store_and_nothing_else(s3: FaultyS3) -> None:
    dataset = make_dataset("s3://bucket/vacuumed", units=2)  # type: ignore[arg-type]
    before = dataset_hash(dataset)
    orphan = write_unit(dataset, "u9", [random_row("r", np.random.default_rng(1))])
    time.sleep(1.1)  # S3 tells times to the second.
    s3.plan(rate=0.1, kinds=SOME, seed=4)
    assert [r.path.rpartition("/")[2] for r in vacuum(dataset, older_than_hours=0).removed] == [orphan.name]
    assert dataset_hash(Dataset.open(dataset.uri)) == before
