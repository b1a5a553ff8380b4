"""A vacuum removes what nobody will ask for, and nothing else; a migration brings old datasets along."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus.documents import Reject
from pipelines.shards import migrate as migrations
from pipelines.shards import schema
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.digest import dataset_hash
from pipelines.shards.log import commit_name
from pipelines.shards.migrate import migrate
from pipelines.shards.storage import Storage
from pipelines.shards.vacuum import vacuum
from pipelines.shards.verify import verify
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize import ledger
from pipelines.tokenize.ledger import Ledger
from tests.faults import FaultyS3, faulty_s3
from tests.pipelines.corpora import make_dataset, random_row, write_unit
from tests.pipelines.jobs import run_units, text_recipe, write_text

REJECT = Reject(source="s/a.png", position=0, reason="image: damaged", error="s/a.png: truncated")


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path / "d")
    for name, value in request.getfixturevalue("s3").environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket{tmp_path}"


def orphan(dataset: Dataset, unit: str) -> WrittenShard:
    return write_unit(dataset, unit, [random_row(f"{unit}r", np.random.default_rng(0))], [REJECT])


def replaced(dataset: Dataset, old: str, new: str) -> None:
    """A commit that puts one unit in the place of another."""
    dataset.commit([orphan(dataset, new)], ancestors=lambda units: {old} if new in units else set())


def files(dataset: Dataset, folder: str) -> set[str]:
    return {info.base_name for info in dataset.storage.listed(folder)}


def test_orphans_go_and_every_version_stays_readable(place: str) -> None:
    dataset = make_dataset(place, units=2)
    replaced(dataset, "u0", "u2")
    hashes = {version: dataset_hash(Dataset.open(place, version)) for version in range(4)}
    lost = orphan(dataset, "u1")
    assert dataset.commit([lost]) == []
    assert vacuum(dataset).removed == [], "too young"
    named = vacuum(dataset, older_than_hours=0, dry_run=True)
    assert lost.name in files(dataset, "shards")
    done = vacuum(dataset, older_than_hours=0)
    assert done == named
    assert Counter(file.kind for file in done.removed) == {"shard": 1, "quarantine": 1}
    assert done.size == lost.size + lost.rejects_size
    assert lost.name not in files(dataset, "shards") | files(dataset, "quarantine")
    assert {version: dataset_hash(Dataset.open(place, version)) for version in range(4)} == hashes
    assert vacuum(dataset, older_than_hours=0).removed == []


def test_dropped_versions_say_so_and_the_others_stay_whole(place: str) -> None:
    dataset = make_dataset(place, units=2)
    for n in range(2, 5):
        replaced(dataset, f"u{n - 1}", f"u{n}")
    assert vacuum(dataset, keep_versions=2).oldest == 0, "all were the newest one a moment ago"
    kept = dataset_hash(Dataset.open(place, 4))
    done = vacuum(dataset, keep_versions=2, older_than_hours=0)
    assert done.oldest == 4
    # u1 and u2 left the newest version in versions 3 and 4; version 4 still has u3.
    assert Counter(file.kind for file in done.removed) == {"shard": 2, "quarantine": 1, "statistics": 3}
    assert len(dataset.quarantine.files()) == 2
    for version in (4, 5):
        opened = Dataset.open(place, version)
        assert list(verify(opened)) == []
        assert opened.statistics().documents == 8
    assert dataset_hash(Dataset.open(place, 4)) == kept
    for version in (0, 3):
        with pytest.raises(DatasetError, match=f"version {version} is gone, a `braid vacuum.*has versions 4 to 5"):
            Dataset.open(place, version)
    with pytest.raises(DatasetError, match="no version 9; it has versions 4 to 5"):
        Dataset.open(place, 9)
    assert vacuum(dataset, older_than_hours=0).removed == []
    # The next roll-ups do not need what is gone.
    dataset.storage.delete("statistics/00000000000000000005.json")
    dataset.storage.delete("statistics/00000000000000000004.json")
    replaced(dataset, "u4", "u5")
    assert Dataset.open(place).statistics().documents == 8


def test_what_a_running_job_has_is_never_touched_and_what_killed_ones_left_goes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    killed = ShardWriter(dataset.storage, dataset.vocabulary, "killed", {"rows": []})
    (part,) = (path for path in (tmp_path / "d" / "shards").iterdir() if path.name.endswith(".part"))
    leftovers = [
        part,
        tmp_path / "d" / "statistics" / ".00000000000000000009.json.0a1b2c3d",
        tmp_path / "d" / ".sources.json.0a1b2c3d",
        tmp_path / "d" / "shards" / "_delta_log" / "_commit_0a1b2c3d-0000-4000-8000-000000000000.json.tmp",
        tmp_path / "d" / "shards" / orphan(dataset, "old").name,
    ]
    mine = tmp_path / "d" / ".gitignore"
    for path in (*leftovers[1:4], mine):
        path.write_bytes(b"half")
    hours = 3600
    now = time.time()
    for path in (*leftovers, mine, *(tmp_path / "d").rglob("*.json"), Path(dataset.shards()[0].path)):
        os.utime(path, (now - 25 * hours, now - 25 * hours))
    running = orphan(dataset, "running")
    writing = ShardWriter(dataset.storage, dataset.vocabulary, "writing", {"rows": []})
    done = vacuum(dataset)
    assert {file.path for file in done.removed} == {str(path) for path in leftovers}
    assert not any(path.exists() for path in leftovers)
    assert mine.exists()
    assert len(dataset.commit([running, writing.finish()])) == 2
    assert list(verify(Dataset.open(dataset.uri))) == []
    assert Dataset.open(dataset.uri).rejects() == 1
    killed._writer.close()


def test_a_finished_unit_that_a_vacuum_took_is_not_committed(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    waiting = orphan(dataset, "waiting")
    vacuum(dataset, older_than_hours=0)
    with pytest.raises(DatasetError, match=r"written with \d+ bytes, but now missing; it is not committed"):
        dataset.commit([waiting])
    assert list(verify(Dataset.open(dataset.uri))) == []


def test_files_that_the_ledger_has_merged_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_SMALL_FILES", 3)
    recipe = text_recipe(tmp_path)
    for n in range(4):
        write_text(tmp_path, f"new{n}", "the fox")
        dataset = run_units(recipe)
    book = Ledger(dataset.storage)
    known = book.known
    done = vacuum(dataset, older_than_hours=0)
    assert Counter(file.kind for file in done.removed) == {"ledger": 3}
    assert len(files(dataset, "inputs")) == len(book._files)
    assert Ledger(dataset.storage).known == known
    assert run_units(recipe).version == dataset.version


def test_the_command_says_what_it_removed(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", units=1)
    lost = orphan(dataset, "lost")
    size = lost.size + lost.rejects_size
    for arguments, answer in {
        ("--dry-run",): "would remove no files, 0 bytes; versions 0 to 1 stay.",
        (
            "--older-than-hours=0",
            "--dry-run",
        ): f"would remove 1 shard files, 1 quarantine files, {size:,} bytes; versions 0 to 1 stay.",
        ("--older-than-hours=0", "--keep-versions=1"): "statistics",
    }.items():
        command = [sys.executable, "-m", "pipelines.cli", "vacuum", str(tmp_path / "d"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert answer in done.stdout or "versions 1 to 1 stay" in done.stdout


def test_a_dataset_of_an_older_format_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataset_hash(make_dataset(tmp_path / "d", units=2))
    assert migrate(str(tmp_path / "d")) == (1, 1)
    for module in (schema, migrations):
        monkeypatch.setattr(module, "FORMAT_VERSION", 3)
    with pytest.raises(
        DatasetError, match="written in format 1, this Braid reads 3; it is no Braid dataset, or one of"
    ):
        Dataset.open(tmp_path / "d")

    killed = [True]

    def to_2(dataset: Storage) -> None:
        dataset.write("two", b"")

    def to_3(dataset: Storage) -> None:
        assert dataset.read("two") == b""
        if killed.pop():
            raise KeyboardInterrupt
        dataset.write("three", b"")

    monkeypatch.setattr(migrations, "STEPS", {1: to_2, 2: to_3})
    with pytest.raises(DatasetError, match=r"in format 1, this Braid reads 3; run `braid migrate .*/d`"):
        Dataset.open(tmp_path / "d")
    with pytest.raises(KeyboardInterrupt):
        migrate(str(tmp_path / "d"))
    with pytest.raises(DatasetError, match="in format 2, this Braid reads 3; run `braid migrate"):
        Dataset.open(tmp_path / "d")
    killed.append(False)
    assert migrate(str(tmp_path / "d")) == (2, 3)
    dataset = Dataset.open(tmp_path / "d")
    assert dataset_hash(dataset) == before
    assert dataset.statistics().documents == 14
    dataset.commit([orphan(dataset, "new")])
    assert Dataset.open(tmp_path / "d").statistics().documents == 15
    monkeypatch.setattr(migrations, "FORMAT_VERSION", 2)
    with pytest.raises(DatasetError, match="no way from format 3 to 2; update Braid"):
        migrate(str(tmp_path / "d"))
    with pytest.raises(DatasetError, match="no token dataset here"):
        migrate(str(tmp_path / "nothing"))


def test_versions_stay_whole_through_checkpoints_of_the_log(tmp_path: Path) -> None:
    """Delta writes a checkpoint every 100 commits, and drops the log of before a month at such a time, if it is let."""
    dataset = make_dataset(tmp_path / "d", units=1)
    dataset._table.alter.set_table_properties({"delta.checkpointInterval": "5"})
    month = time.time() - 40 * 24 * 3600
    for n in range(1, 12):
        for path in (tmp_path / "d" / "shards" / "_delta_log").iterdir():
            os.utime(path, (month, month))
        dataset.commit([orphan(dataset, f"u{n}")])
    assert any(name.endswith(".checkpoint.parquet") for name in files(dataset, "shards/_delta_log"))
    assert dataset.storage.exists(f"shards/{commit_name(0)}")
    assert Dataset.open(dataset.uri, 1).statistics().documents == 7
    assert len(Dataset.open(dataset.uri).shards()) == 12
