"""A tick of a recurring pipeline with nothing to do, against a bare listing of the same files: `python -m benchmarks.tick`.

100,000 texts are known to a dataset; the command is started anew each time, as a scheduler starts it. The other side is a
`find` that asks each file for its size and times, which is the least that anything must do to know that nothing came.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.measuring import close, medians, result
from pipelines.recipe import read_recipe
from pipelines.recurring.executor import step_environment
from pipelines.shards.dataset import Dataset
from pipelines.shards.writer import ShardWriter
from pipelines.tokenize.job import open_or_create
from pipelines.tokenize.ledger import Ledger
from pipelines.tokenize.planning import plan
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers


def prepare(folder: Path, inputs: int) -> Path:
    """Texts, a dataset that knows all of them, and a pipeline over it; the pipeline's recipe."""
    for number in range(inputs):
        if number % 1000 == 0:
            (folder / f"texts/{number // 1000:04}").mkdir(parents=True)
        (folder / f"texts/{number // 1000:04}/{number:07}.txt").write_text("a fox")
    recipe = {
        "dataset": str(folder / "tokens"),
        "sources": [{"name": "texts", "reader": "media_folder", "path": str(folder / "texts")}],
        "units": {"inputs": 200},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = read_recipe(TokenizeRecipe, folder / "recipe.yaml")
    dataset = open_or_create(settings, Tokenizers.load(settings).vocabulary(settings))
    work = plan(dataset, Ledger(dataset.storage), settings.sources, settings.units)
    # Empty shards: how many rows they hold changes nothing for a tick.
    written = [
        ShardWriter(dataset.storage, dataset.vocabulary, unit.id, unit.record()).finish() for unit in work.pending
    ]
    dataset.commit(written)
    assert len(Dataset.open(settings.dataset).units) == len(work.pending)
    pipeline = {"state": str(folder / "state"), "tokenize": {"recipe": str(folder / "recipe.yaml")}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    return folder / "pipeline.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--inputs", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline = prepare(folder, arguments.inputs)
        command = [sys.executable, "-m", "pipelines.cli", "pipeline", "tick", str(pipeline)]
        said = ""

        def tick() -> None:
            nonlocal said
            environment = step_environment() | {"COLUMNS": "200"}
            said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

        def find() -> None:
            listing = ["find", str(folder / "texts"), "-type", "f", "-printf", "%p %s %T@\n"]
            found = subprocess.run(listing, check=True, capture_output=True, env=os.environ).stdout
            assert found.count(b"\n") == arguments.inputs

        ours, theirs = medians(tick, find, repeat=3 if arguments.quick else 11)
        assert "nothing to do: tokenize: all" in said, said
        what = f"tick with nothing to do over {arguments.inputs:,} known inputs, against find (lower is better)"
        close([result(what, ours, theirs, "s", checked=said.strip())])


if __name__ == "__main__":
    main()
