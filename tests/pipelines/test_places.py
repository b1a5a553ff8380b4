"""How many workers fit where, and what each of them takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from pipelines.shards.writer import WrittenShard
from pipelines.tokenize import pool
from pipelines.tokenize.job import tokenize
from pipelines.tokenize.recipe import ClusterSettings
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.jobs import text_recipe


@pytest.mark.parametrize(
    ("gpus", "nodes", "cpus"),
    [
        (1, [(16, 1)], 12),
        (1, [(8, 1)], 6),
        (1, [(256, 8)], 12),
        (0.5, [(16, 1)], 6),
        (2, [(16, 4)], 6),
        (1, [(2, 1)], 1),
        (1, [(1, 2)], 1),
        # The node with the fewest CPUs for a GPU decides, and those without any do not count.
        (1, [(64, 4), (32, 4), (4, 0)], 6),
        (2, [(64, 4), (4, 1)], 12),
        (1, [(64, 0)], 1),
        (1, [], 1),
        (0, [(64, 8)], 1),
    ],
)
def test_a_worker_with_a_gpu_takes_most_of_its_share_of_the_cpus(
    gpus: float, nodes: list[tuple[float, float]], cpus: float
) -> None:
    assert ClusterSettings(gpus_per_worker=gpus).cpus_of_workers(nodes) == cpus
    assert ClusterSettings(gpus_per_worker=gpus, cpus_per_worker=2.5).cpus_of_workers(nodes) == 2.5


class Witness(UnitWorker):
    """Writes down what it runs with."""

    def run(self, unit: WorkUnit) -> WrittenShard:
        (Path(self.recipe.dataset).parent / "witness").write_text(
            f"{self.recipe.cluster.cpus_per_worker:g} of a worker, {ray.available_resources().get('CPU', 0):g} left"
        )
        return super().run(unit)


@pytest.mark.slow
@pytest.mark.parametrize(("named", "told"), [([], "6 of a worker, 2 left"), (["3"], "3 of a worker, 5 left")])
def test_the_share_is_what_the_worker_gets(
    named: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = ray.init
    monkeypatch.setattr(pool.ray, "init", lambda **options: init(**options | {"num_cpus": 8, "num_gpus": 1}))
    monkeypatch.setattr(pool, "GPU", "cpu")
    monkeypatch.setattr(pool, "UnitWorker", Witness)
    overrides = [f"cluster.cpus_per_worker={cpus}" for cpus in named]
    recipe = text_recipe(tmp_path, "cluster.gpus_per_worker=1", "cluster.cpu_workers=0", *overrides, one="the fox")
    tokenize(recipe)
    assert (tmp_path / "witness").read_text() == told
