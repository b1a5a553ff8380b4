"""A report of a table of many shards on one core: `python -m benchmarks.report [--quick] [--keep FOLDER]`.

Makes a table of 100,000 shards in 100 commits (8 files of real codes, hard-linked under names of their own), then writes its
page with 48 decoded documents, pinned to one core. Beside it stands what has to be done without roll-ups: pyarrow opens every
footer, for the number of rows alone. A table of 100 shards says what memory depends on.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measuring import close, result
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.writer import ShardWriter, WrittenShard
from pipelines.tokenize.history import record_recipe
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers

SHARDS, QUICK_SHARDS, COMMITS = 100_000, 5_000, 100
TEMPLATES, ROWS = 8, 24
LEAST = 100
"""Shards of the small table."""


def recipe_of(folder: Path) -> TokenizeRecipe:
    return TokenizeRecipe.model_validate(
        {
            "dataset": str(folder),
            "sources": [{"name": "made", "reader": "jsonl", "path": str(folder)}],
            "tokenizers": {"image": {}, "audio": {"n_q": 4, "max_frames": 250}},
            "sequence_length": 2048,
        }
    )


def row(vocabulary: Vocabulary, rng: np.random.Generator) -> Row:
    def codes(size: int, *shape: int) -> np.ndarray:
        # Some codes are used often and many hardly ever, as in real data.
        return np.minimum(rng.geometric(0.01, shape), size - 1).astype(np.int32)

    spans = [
        EncodedSpan(modality=Modality.TEXT, codes=codes(vocabulary.text_pieces, int(rng.integers(5, 300)))),
        EncodedSpan(modality=Modality.IMAGE, codes=codes(vocabulary.image_codebook_size, 16, 16)),
        EncodedSpan(
            modality=Modality.AUDIO, codes=codes(vocabulary.audio_codebook_size, int(rng.integers(20, 150)), 4)
        ),
    ]
    return Row(
        row_id=rng.bytes(16).hex(),
        content_hash=rng.bytes(16).hex(),
        source=f"made{rng.integers(3)}/{rng.integers(10**9)}",
        sequence=interleave(vocabulary, spans),
        raw_bytes=(int(rng.integers(20, 1500)), 20_000, 40_000),
    )


def make(folder: Path, shards: int) -> Dataset:
    """A table of so many shards; its files are links to a few."""
    recipe = recipe_of(folder)
    vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
    dataset = Dataset.create(folder, vocabulary, validation_share=0.01)
    record_recipe(dataset.storage, recipe)
    rng = np.random.default_rng(0)
    templates: list[WrittenShard] = []
    for index in range(TEMPLATES):
        with ShardWriter(dataset.storage, vocabulary, f"template{index}", {"rows": _unit()}) as writer:
            for _ in range(ROWS):
                writer.add(row(vocabulary, rng))
            templates.append(writer.finish())
    each = -(-shards // COMMITS)
    for first in range(0, shards, each):
        dataset.commit([_linked(folder, templates[n % TEMPLATES], n) for n in range(first, min(first + each, shards))])
    return dataset


def _unit() -> list[dict[str, object]]:
    """A unit that reads nothing: there are no originals."""
    named = {"unit": "", "replaces": [], "source": "made", "uri": None, "size": 0, "etag": "", "parts": []}
    return [named | {"divisible": False, "start": 0, "stop": 0}]


def _linked(folder: Path, template: WrittenShard, n: int) -> WrittenShard:
    unit = f"{n * 2654435761 % 2**32:020x}"
    name = f"{unit}-{template.name.partition('-')[2]}"
    os.link(folder / "shards" / template.name, folder / "shards" / name)
    return replace(template, unit=unit, name=name)


def page(folder: Path, out: Path) -> tuple[float, float, float]:
    """Write the report in a process of its own on one core: wall seconds, CPU seconds, peak MB."""
    command = ["taskset", "-c", "0", sys.executable, "-m", "pipelines.cli", "stats", str(folder), "--html", str(out)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.NamedTemporaryFile() as usage:
        subprocess.run(["/usr/bin/env", "python3", "-c", _WATCH, usage.name, *command], check=True, capture_output=True)
        peak = float(Path(usage.name).read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, peak / 1e3


_WATCH = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[2:], check=True); "
    "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))"
)


def footers(dataset: Dataset) -> int:
    """Rows by opening every footer."""
    return sum(pq.read_metadata(shard.path).num_rows for shard in dataset.shards())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SHARDS:,} shards")
    parser.add_argument("--keep", type=Path, help="make the tables here, or use those that are here")
    arguments = parser.parse_args()
    shards = QUICK_SHARDS if arguments.quick else SHARDS
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.keep or Path(temporary)
        paths = {count: base / f"shards-{count}" for count in (LEAST, shards)}
        datasets = {n: Dataset.open(p) if Dataset.exists(p) else make(p, n) for n, p in paths.items()}
        told = {count: page(path, base / "report.html") for count, path in paths.items()}
        began = time.perf_counter()
        rows = footers(datasets[shards])
        theirs = time.perf_counter() - began
        figures = json.loads(
            subprocess.run([sys.executable, "-m", "pipelines.cli", "stats", str(paths[shards]), "--json"],
                           check=True, capture_output=True, text=True).stdout
        )  # fmt: skip
        if figures["documents"] != rows or figures["shards"] != shards:
            raise SystemExit(f"the report says {figures['documents']} documents, the footers {rows}")
        size = (base / "report.html").stat().st_size
    wall, cpu, peak = told[shards]
    print(f"{shards:,} shards: {wall:.1f} s wall, {cpu:.1f} s CPU, peak {peak:,.0f} MB, page {size / 1e6:.2f} MB")
    small = told[LEAST]
    print(f"{LEAST:,} shards: {small[0]:.1f} s wall, {small[1]:.1f} s CPU, peak {small[2]:,.0f} MB")
    what = f"whole report of {shards:,} shards on one core, against pyarrow opening every footer (lower is better)"
    close([result(what, wall, theirs, "s", checked=f"documents in the report = rows in the footers = {rows:,}")])


if __name__ == "__main__":
    main()
