"""What `image_job` and `audio_job` share: the whole job against the bare tokenizer loop on the same media, on 2 cores.

The bare loop encodes media that lie decoded in memory, one at a time, in a process a core, and does nothing else. The
job reads files, decodes, tokenizes, interleaves, writes Parquet and commits. All codes are compared.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpora import media
from benchmarks.jobs import Load, bare, ids_by_source, whole_job
from benchmarks.measuring import close, hardware, result
from pipelines.sequence import Modality
from pipelines.tokenize.recipe import TokenizeRecipe

Decode = Callable[[bytes, str], np.ndarray]
"""A file's bytes to what the tokenizer takes."""


def run(
    modality: Modality,
    tokenizers: dict[str, Any],
    decode: Decode,
    load: Load,
    amount: Callable[[np.ndarray], float],
    unit: str,
    doc: str | None,
) -> None:
    """Parse the command line, run both sides, print ratios.

    Args:
        tokenizers: that part of the recipe.
        load: makes the tokenizer of one item; its codes [...] must be those of the job.
        amount: how much one item is, in units of `unit`.
    """
    kind, default = ("png", 3000) if modality is Modality.IMAGE else ("wav", 3000)
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmarks"))
    parser.add_argument("--count", type=int, default=default, help="media files")
    parser.add_argument("--quick", action="store_true", help="200 files")
    parser.add_argument("--scaling", type=int, nargs="*", default=[], help="also time jobs of so many workers")
    arguments = parser.parse_args()
    corpus = media(arguments.folder, kind, 200 if arguments.quick else arguments.count)
    files = sorted(corpus.iterdir())
    items = [decode(file.read_bytes(), file.name) for file in files]
    shares = [items[index::2] for index in range(2)]
    total = sum(amount(item) for item in items)

    def recipe(workers: int) -> TokenizeRecipe:
        return TokenizeRecipe.model_validate(
            {
                "dataset": str(arguments.folder / f"{modality.label}_tokens"),
                "sources": [{"name": "m", "reader": "media_folder", "path": str(corpus)}],
                "tokenizers": tokenizers,
                "sequence_length": 16384,
                "units": {"inputs": max(len(files) // 32, 8)},
                "workers": workers,
            }
        )

    bare_s, codes = bare(load, shares)
    job_s, summary = whole_job(recipe(2))
    job = ids_by_source(recipe(2).dataset, modality)
    for index, file in enumerate(files):
        if not np.array_equal(job[f"m/{file.stem}"], np.asarray(codes[index % 2][index // 2]).reshape(-1)):
            raise SystemExit(f"{file}: the job's codes are not those of the bare loop")
    checked = f"codes of all {len(files):,} files equal"
    results = [
        result(
            f"whole job with Ray's start ({summary.ready_s:.1f} s) / bare loops, 2 cores",
            total / job_s,
            total / bare_s,
            unit,
            checked=checked,
        ),
        result(
            "the same without Ray's start", total / (job_s - summary.ready_s), total / bare_s, unit, checked=checked
        ),
    ]
    for workers in arguments.scaling:
        seconds, summary = whole_job(recipe(workers))
        rate = total / (seconds - summary.ready_s)
        results.append(
            {
                "what": f"job with {workers} workers, without Ray's start",
                "ours": round(rate, 3),
                "unit": unit,
                "hardware": hardware(),
            }
        )
    for line in results:
        print(line)
    shutil.rmtree(recipe(2).dataset)
    close(results)
