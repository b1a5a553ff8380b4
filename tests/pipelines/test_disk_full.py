"""A disk that becomes full: the job says so, what is committed stays whole, and the same command goes on from there."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.storage import DiskFullError
from pipelines.shards.verify import verify
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenizers.fetch import FetchError, fetch
from tests.pipelines.disks import fill
from tests.pipelines.jobs import run_units, text_recipe


def check_committed(recipe: TokenizeRecipe) -> int:
    """Nothing that is half there can be seen; how many documents are."""
    if not Dataset.exists(recipe.dataset):
        return 0
    dataset = Dataset.open(recipe.dataset)
    assert list(verify(dataset)) == []
    return dataset.statistics().documents


def error_of(recipe: TokenizeRecipe) -> str:
    """What a run of a job says of the full disk; nothing if it gets through."""
    try:
        run_units(recipe, each=True)
    except DiskFullError as error:
        return str(error)
    return ""


def parts(disk: Path) -> list[Path]:
    """Unfinished shards."""
    return list(disk.rglob(".*.part"))


def test_a_disk_that_is_full_at_any_moment_loses_nothing(disk: Path, tmp_path: Path) -> None:
    usual = text_recipe(tmp_path)
    expected = dataset_hash(run_units(usual))
    moments = set()
    for turn, left in enumerate(range(0, 280_000, 16_384)):
        recipe = usual.model_copy(update={"dataset": str(disk / f"d{turn}")})
        filler = fill(disk, left)
        said = error_of(recipe)
        assert not said or re.search(
            rf"\({disk}: .* Free space there or enlarge it, and run the same command again", said
        )
        assert parts(disk) == []
        # A full disk can still be read.
        moments.add((bool(said), Dataset.exists(recipe.dataset), check_committed(recipe)))
        filler.unlink()
        dataset = run_units(recipe, each=True)
        assert list(verify(dataset)) == []
        assert dataset_hash(dataset) == expected
        subprocess.run(["rm", "-r", recipe.dataset], check=True)
    # It was full before there was a dataset, before and after some commits, and not at all.
    assert {(True, False, 0), (True, True, 0), (False, True, 10)} <= moments
    assert any(full and 0 < documents < 10 for full, _, documents in moments)


def test_a_download_onto_a_full_disk_says_so(disk: Path, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(7000)
    (tmp_path / "last.ckpt").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    filler = fill(disk, 4096)
    with pytest.raises(
        FetchError, match=r"last.ckpt.part: cannot be written: No space left .* make room and try again"
    ):
        fetch((tmp_path / "last.ckpt").as_uri(), disk, sha256=sha256)
    filler.unlink()
    assert fetch((tmp_path / "last.ckpt").as_uri(), disk, sha256=sha256).read_bytes() == content


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_fills_the_disk_ends_with_its_remedy_and_goes_on_when_there_is_room(
    disk: Path, tmp_path: Path
) -> None:
    usual = text_recipe(tmp_path, **{f"t{n}": random.Random(n).randbytes(20_000).hex() for n in range(12)})
    expected = dataset_hash(run_units(usual))
    recipe = usual.model_copy(update={"dataset": str(disk / "tokens")})
    command = [
        *(sys.executable, "-m", "pipelines.cli", "tokenize", str(tmp_path / "recipe.yaml")),
        *(f"dataset={recipe.dataset}", "workers=1", "units.inputs=1"),
    ]
    filler = fill(disk, 150_000)
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1, failed.stdout
    assert "the disk is full" in failed.stderr
    assert "run the same command again" in failed.stderr.replace("\n", " ")
    assert "Traceback" not in failed.stderr
    assert parts(disk) == []
    assert check_committed(recipe) < 12
    filler.unlink()
    subprocess.run(command, capture_output=True, text=True, check=True)
    dataset = Dataset.open(recipe.dataset)
    assert list(verify(dataset)) == []
    assert dataset_hash(dataset) == expected
