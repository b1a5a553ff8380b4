"""Units that kill their workers: they hold up nothing else, and can be left out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectLostError

from pipelines.shards.dataset import Dataset
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize import pool
from pipelines.tokenize.job import tokenize
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import Request, dry_plan
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.jobs import stored, text_recipe


class Poisoned(UnitWorker):
    """Dies, as if it had no memory left, over inputs that are named so."""

    def run(self, unit: WorkUnit) -> WrittenShard:
        if any("poison" in piece.input.uri for piece in unit.slices):
            os._exit(137)
        return super().run(unit)


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_is_named_when_all_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "UnitWorker", Poisoned)
    texts = {f"t{n}": f"the quick fox {n}" for n in range(4)} | {"poison": "long " * 500}
    recipe = text_recipe(tmp_path, "units.inputs=1", "units.tries=2", "workers=2", **texts)
    with pytest.raises(
        pool.UnitsFailedError, match=r"failed 2 times, last because its worker died .* from poison to poison"
    ) as error:
        tokenize(recipe)
    dataset = Dataset.open(recipe.dataset)
    assert stored(dataset) == {"t0", "t1", "t2", "t3"}
    (unit,) = error.value.units
    left = dry_plan(dataset, recipe.sources, recipe.units)
    assert [pending.id for pending in left.pending] == [unit]
    without = Request(without=frozenset([unit]))
    assert tokenize(recipe, request=without).units == 0
    (tmp_path / "texts" / "new.txt").write_text("the dog")
    assert tokenize(recipe, request=without).documents == 1
    assert Ledger(dataset.storage).units([unit])[0].id == unit


class PoisonedOnGPU(Poisoned):
    """Beside a GPU, were there one, with units from several threads."""

    def run(self, unit: WorkUnit) -> WrittenShard:
        self.decoders = 1
        # So that others are being done when it dies.
        time.sleep(0.2)
        return super().run(unit)


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, 2])
def test_of_units_that_a_worker_does_at_once_the_one_that_kills_it_is_to_blame(
    tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = ray.init
    monkeypatch.setattr(pool.ray, "init", lambda **options: init(**options, num_gpus=1))
    monkeypatch.setattr(pool, "GPU", "cpu")
    monkeypatch.setattr(pool, "UnitWorker", PoisonedOnGPU)
    texts = {f"t{n}": f"the quick fox {n}" for n in range(9)} | {"t4poison": "long", "t7poison": "long"}
    overrides = "units.inputs=1", f"units.tries={tries}", "cluster.gpus_per_worker=1", "cluster.cpu_workers=0"
    recipe = text_recipe(tmp_path, *overrides, **texts)
    with pytest.raises(pool.UnitsFailedError) as error:
        tokenize(recipe)
    assert str(error.value).count(f"failed {tries} times, last because its worker died") == 2
    assert len(error.value.units) == 2
    assert "t4poison" in str(error.value)
    assert "t7poison" in str(error.value)
    assert stored(Dataset.open(recipe.dataset)) == {f"t{n}" for n in range(9)}


@pytest.mark.slow
def test_when_all_units_kill_their_workers_none_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "UnitWorker", Poisoned)
    monkeypatch.setattr(pool, "MOST_DIED", 3)
    texts = {f"poison{n}": "the fox" for n in range(20)}
    recipe = text_recipe(tmp_path, "units.inputs=1", "units.tries=1", "workers=1", **texts)
    with pytest.raises(pool.UnitsFailedError) as error:
        tokenize(recipe)
    assert error.value.units == []
    assert 3 <= str(error.value).count("failed 1 times") <= 4


@pytest.mark.slow
def test_a_result_that_is_lost_with_its_node_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get, lost = ray.get, []

    def getting(reference: Any, **how: Any) -> Any:
        result = get(reference, **how)
        if isinstance(result, WrittenShard) and len(lost) < 2:
            lost.append(reference)
            raise ObjectLostError(reference.hex(), None, "")
        return result

    monkeypatch.setattr(pool.ray, "get", getting)
    recipe = text_recipe(tmp_path, "units.inputs=1", "workers=1", **{f"t{n}": f"the quick fox {n}" for n in range(4)})
    tokenize(recipe)
    assert len(lost) == 2
    assert stored(Dataset.open(recipe.dataset)) == {"t0", "t1", "t2", "t3"}
