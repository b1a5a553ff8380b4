"""Whole tokenize jobs from S3 to S3, with a real Ray, through a network that fails: nothing lost, nothing doubled."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.recipe import read_recipe
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.verify import verify
from pipelines.tokenize.job import tokenize
from pipelines.tokenize.recipe import TokenizeRecipe
from tests.faults import KINDS, FaultyS3
from tests.pipelines.jobs import run_units
from tests.pipelines.stores import copy, object_store
from tests.pipelines.tiny import write_corpus, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROUGH = {"rate": 0.15, "kinds": list(KINDS), "delay_s": 2.5}
"""One request of seven: some forty faults a job."""


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with object_store() as server:
        yield server


@pytest.fixture
def s3(server: FaultyS3) -> FaultyS3:
    server.plan()
    return server


class Job:
    """A corpus on disk and in S3, a recipe for S3, and the hash that an undisturbed run on the disk gives."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        write_corpus(folder / "raw")
        store = f"s3://bucket/{folder.name}"
        copy(folder / "raw", f"{store}/raw")
        self.file = write_recipe(folder)
        self.dataset = f"{store}/tokens"
        self.overrides = [
            f"dataset={self.dataset}",
            f"sources.0.path={store}/raw/stamps",
            f"sources.1.path={store}/raw/lines.jsonl",
            *overrides,
        ]
        local = [f"sources.0.path={folder}/raw/stamps", f"sources.1.path={folder}/raw/lines.jsonl"]
        self.expected = dataset_hash(run_units(read_recipe(TokenizeRecipe, self.file, local)))

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pipelines.cli", "tokenize", str(self.file), *self.overrides]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def check(self) -> None:
        dataset = Dataset.open(self.dataset)
        assert list(verify(dataset)) == []
        assert dataset_hash(dataset) == self.expected
        assert dataset.statistics().documents == 42
        assert dataset.rejects() == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_job_through_a_failing_network_makes_the_undisturbed_dataset(seed: int, s3: FaultyS3, tmp_path: Path) -> None:
    job = Job(tmp_path)
    s3.plan(seed=seed, **ROUGH)
    summary = tokenize(read_recipe(TokenizeRecipe, job.file, job.overrides))
    faults = [fault for _, fault in s3.log() if fault]
    assert set(faults) == set(KINDS)
    assert len(faults) > 20
    assert (summary.documents, summary.rejects) == (42, 0)
    s3.plan()
    job.check()
    verified = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "verify", job.dataset], capture_output=True, text=True, check=True
    )
    assert "42" in verified.stdout


def test_two_jobs_at_once_make_one_dataset_in_a_store(s3: FaultyS3, tmp_path: Path) -> None:
    job = Job(tmp_path)
    s3.plan(seed=7, rate=0.05, kinds=list(KINDS), delay_s=2.5)
    jobs = [job.start(), job.start()]
    said = [process.communicate(timeout=400) for process in jobs]
    assert [process.returncode for process in jobs] == [0, 0], "\n".join(error for _, error in said)
    s3.plan()
    job.check()


def test_a_store_that_goes_down_for_good_ends_the_job_and_the_next_run_goes_on(s3: FaultyS3, tmp_path: Path) -> None:
    job = Job(tmp_path, "units.tries=1")
    process = job.start()
    while process.poll() is None and sum("/tokens/shards/" in r and "parquet" in r for r, _ in s3.log()) < 8:
        time.sleep(0.05)
    s3.down()
    began = time.monotonic()
    _, error = process.communicate(timeout=300)
    assert time.monotonic() - began < 240
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "failed" in error
    assert "run the same command again" in error
    s3.plan()
    again = job.start()
    assert again.wait(300) == 0
    job.check()
