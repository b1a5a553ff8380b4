"""What the job benchmarks share: a bare loop in processes of its own, and a whole job."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.job import Summary, tokenize
from pipelines.tokenize.recipe import TokenizeRecipe

Load = Callable[[], Callable[[Any], Any]]
"""Makes a tokenizer inside its process; the tokenizer then takes one item."""


def bare(load: Load, shares: Sequence[Sequence[Any]]) -> tuple[float, list[list[Any]]]:
    """Encode shares of items, each in a process of its own, one after the other; the slowest process's seconds.

    Tokenizers are loaded and warmed up before the clock starts, and items lie in memory.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(len(shares))
    with context.Pool(len(shares), initializer=_set_barrier, initargs=(start,)) as pool:
        done = pool.starmap(_encode, [(load, share) for share in shares], chunksize=1)
    return max(seconds for seconds, _ in done), [codes for _, codes in done]


_barrier: Any = None


def _set_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _encode(load: Load, share: Sequence[Any]) -> tuple[float, list[Any]]:
    import torch

    torch.set_num_threads(1)
    encode = load()
    encode(share[0])
    _barrier.wait()
    began = time.perf_counter()
    codes = [encode(item) for item in share]
    return time.perf_counter() - began, codes


def whole_job(recipe: TokenizeRecipe) -> tuple[float, Summary]:
    """Seconds of the job into a new dataset, from the command to the last commit."""
    shutil.rmtree(recipe.dataset, ignore_errors=True)
    began = time.perf_counter()
    summary = tokenize(recipe)
    return time.perf_counter() - began, summary


def ids_by_source(dataset: str | Path, modality: Modality) -> dict[str, np.ndarray]:
    """What each document of a dataset holds of one modality, special tokens left out, by its source identity."""
    opened = Dataset.open(dataset)
    special = opened.vocabulary.text_pieces
    found: dict[str, np.ndarray] = {}
    for batch in opened.read(["source", "token_ids", "modality_ids"]):
        for index, source in enumerate(batch.column("source").to_pylist()):
            ids = batch.column("token_ids")[index].values.to_numpy()
            keep = batch.column("modality_ids")[index].values.to_numpy() == modality
            if modality is Modality.TEXT:
                keep = keep & (ids < special)
            found[source] = ids[keep]
    return found
