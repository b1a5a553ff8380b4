"""What one more unit costs a dataset that has very many: `python -m benchmarks.commit_scale`.

A real dataset of --shards committed shards and a ledger of --inputs inputs (real files, ten a unit by default), made through
the job's own commits; then one file is added, and what a job does around its workers is timed, from a cold start: list,
open, plan, commit. The shards are hard links to a few real ones, for a commit looks at names and sizes. The driver's cost
a unit is that of the commits made on the way, early ones against late ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from benchmarks.measuring import close, hardware
from pipelines.corpus.documents import Slice
from pipelines.shards.dataset import Dataset
from pipelines.shards.writer import WrittenShard
from pipelines.tokenize.job import open_or_create
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import plan
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.units import WorkUnit
from pipelines.tokenize.worker import UnitWorker

_FILES_A_FOLDER = 1000
_LINKS = 30_000
"""Hard links to one file, under ext4's limit of 65,000."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=500, help="units in one commit")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder); made anew")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of both")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shards //= 50
        arguments.inputs //= 50
        arguments.batch //= 10
    folder = arguments.folder or Path(tempfile.mkdtemp())
    shutil.rmtree(folder, ignore_errors=True)
    write_texts(folder / "texts", arguments.inputs)
    recipe = TokenizeRecipe.model_validate(
        {
            "dataset": str(folder / "tokens"),
            "sources": [{"name": "t", "reader": "media_folder", "path": str(folder / "texts")}],
            "units": {"inputs": arguments.inputs // arguments.shards},
        }
    )
    commits = fill(recipe, arguments.batch)
    print(f"{arguments.shards:,} shards and {arguments.inputs:,} inputs are there", flush=True)
    rows = [one_more(recipe, number) for number in range(arguments.repeat)]
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    third = len(commits) // 3
    early, late = (statistics.median(part) * 1000 / arguments.batch for part in (commits[1:third], commits[-third:]))
    checked = f"version {Dataset.open(recipe.dataset).version} holds every unit once, the new file's too"
    results: list[dict[str, object]] = [
        {
            "what": f"{what}, {arguments.shards:,} shards, {arguments.inputs:,} ledger entries",
            "ours": round(value, 3),
            "unit": unit,
            "hardware": hardware(),
            "checked": checked,
        }
        for what, value, unit in (
            ("plan and commit one more unit, without listing the source", median["plan"] + median["commit"], "s"),
            ("the same with listing", sum(median.values()), "s"),
            *((f"of this {name}", seconds, "s") for name, seconds in median.items()),
            ("driver's cost a unit, first third of the commits", early, "ms"),
            ("driver's cost a unit, last third of the commits", late, "ms"),
        )
    ]
    for line in results:
        print(line)
    shutil.rmtree(folder)
    close(results)


def write_texts(folder: Path, count: int) -> None:
    for number in range(count):
        below = folder / f"{number // _FILES_A_FOLDER:05}"
        if number % _FILES_A_FOLDER == 0:
            below.mkdir(parents=True)
        with open(below / f"{number:07}.txt", "w", encoding="utf-8") as file:  # noqa: PTH123 - a million of them
            file.write("text")


def fill(recipe: TokenizeRecipe, batch: int) -> list[float]:
    """Plan and commit everything; the seconds of each commit."""
    worker = UnitWorker(recipe)
    dataset = open_or_create(recipe, worker.vocabulary)
    ledger = Ledger(dataset.storage)
    work = plan(dataset, ledger, recipe.sources, recipe.units)
    shards = linked(worker, Path(recipe.dataset) / "shards")
    seconds = []
    units = iter(work.pending)
    while some := list(islice(units, batch)):
        written = [next_shard(unit, shards) for unit in some]
        began = time.perf_counter()
        dataset.commit(written, ancestors=ledger.ancestors)
        seconds.append(time.perf_counter() - began)
        if len(seconds) % 20 == 0:
            print(f"{len(seconds) * batch:,} units, {seconds[-1]:.2f} s for the last {batch}", flush=True)
    return seconds


def linked(worker: UnitWorker, folder: Path) -> Iterator[tuple[Path, WrittenShard]]:
    """For ever: a real shard on disk, and what its writer said of it, to be linked to."""
    (source,) = worker.recipe.sources
    pieces = [Slice(input=item, start=0, stop=item.size) for item in islice(source.inputs(), 10)]
    while True:
        made = worker.run(WorkUnit(source=source.name, slices=tuple(pieces), replaces=(uuid.uuid4().hex,)))
        for _ in range(_LINKS):
            yield folder / made.name, made


def next_shard(unit: WorkUnit, shards: Iterator[tuple[Path, WrittenShard]]) -> WrittenShard:
    path, made = next(shards)
    name = f"{unit.id}-{uuid.uuid4().hex[:12]}-{made.name.rpartition('-')[2]}"
    os.link(path, path.with_name(name))
    return dataclasses.replace(made, unit=unit.id, name=name)


def one_more(recipe: TokenizeRecipe, number: int) -> dict[str, float]:
    """Seconds of each part of a job that finds one new file."""
    (source,) = recipe.sources
    (Path(source.path) / f"new{number}.txt").write_text("one more")  # type: ignore[union-attr]
    worker = UnitWorker(recipe)
    began = time.perf_counter()
    for _ in source.inputs():
        pass
    listing = time.perf_counter() - began
    began = time.perf_counter()
    dataset = open_or_create(recipe, worker.vocabulary)
    ledger = Ledger(dataset.storage)
    work = plan(dataset, ledger, recipe.sources, recipe.units)
    planning = time.perf_counter() - began - listing
    (unit,) = work.pending
    assert len(unit.slices) == 1
    written = worker.run(unit)
    began = time.perf_counter()
    (committed,) = dataset.commit([written], ancestors=ledger.ancestors)
    commit = time.perf_counter() - began
    assert committed.unit in Dataset.open(recipe.dataset).units
    return {"listing": listing, "plan": planning, "commit": commit}


if __name__ == "__main__":
    main()
