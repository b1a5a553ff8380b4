"""How many workers fit where, and what each of them takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
        # Neither does one without CPUs for workers, such as the head of a cluster.
        (1, [(128, 8), (0, 8)], 12),
        (1, [(128, 8), (2, 8)], 12),
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


@pytest.mark.parametrize(
    ("gpus", "each", "node", "places"),
    [(1, 12, (128, 8), 8), (1, 12, (32, 8), 2), (0.2, 1, (64, 1), 5), (0, 0.1, (1, 0), 10)],
)
def test_workers_fit_a_node_by_what_it_has_least_of(
    gpus: float, each: float, node: tuple[float, float], places: int
) -> None:
    assert ClusterSettings(gpus_per_worker=gpus).places(*node, each) == places


@pytest.mark.parametrize(
    ("overrides", "sources", "workers"),
    [
        ([], "both", {True: 8, False: 32}),
        (["workers=1"], "both", {True: 1, False: 116}),
        # Without media nothing is held back for workers with a GPU.
        ([], "texts", {False: 128}),
        (["cluster.cpu_workers=0"], "both", {True: 8}),
        (["cluster.cpu_workers=5"], "both", {True: 8, False: 5}),
        (["cluster.gpus_per_worker=0"], "both", {False: 128}),
    ],
)
def test_cpus_that_workers_with_a_gpu_leave_are_for_texts(
    overrides: list[str], sources: str, workers: dict[bool, int], tmp_path: Path
) -> None:
    recipe = text_recipe(tmp_path, "cluster.gpus_per_worker=1", *overrides, one="the fox")
    pictures = recipe.sources[0].model_copy(update={"name": "pictures"})
    recipe = recipe.model_copy(update={"sources": [*recipe.sources, pictures]})
    made = pool.Pool(recipe, "", {source.name for source in recipe.sources})
    texts, media = made._sources
    made._sources = [_Named(texts.name, False), *([_Named(media.name, True)] if sources == "both" else [])]  # type: ignore[list-item]
    nodes = [(128.0, 8.0)]
    assert made._counts(nodes, recipe.cluster.cpus_of_workers(nodes)) == workers


class _Named(NamedTuple):
    name: str
    has_media: bool


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
