"""What tests share: disks, a worker, and a dataset and a run on it that are made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.pretrain.run import RunResult
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.corpora import make_dataset
from tests.pipelines.disks import small_disk
from tests.pipelines.tiny import tiny_recipe
from tests.pipelines.training import run_recipe, trained


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents of all modalities; nobody adds to it."""
    return make_dataset(tmp_path_factory.mktemp("pretrain") / "tokens", units=3, rows=30)


@pytest.fixture(scope="session")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """An undisturbed run of `run_recipe`; nobody writes to it."""
    return trained(run_recipe(dataset, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all pages; see `tests.pipelines.pages`."""
    from tests.pipelines.pages import write_pages

    return write_pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[UnitWorker]:
    """Of the tiny recipe."""
    worker = UnitWorker(tiny_recipe(tmp_path))
    yield worker
    worker.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    with small_disk(tmp_path / "disk") as folder:
        yield folder
