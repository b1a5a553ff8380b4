"""Loading: Braid's loader against litdata, MosaicML Streaming and Hugging Face datasets: `python -m benchmarks.loader`.

The same tokens for all: real documents of text, pictures and speech (`benchmarks.token_corpus`), zstd, shuffled, packed into
batches of 8 x 4096 with boundaries and targets, by one thread of one process. Time is the process's own (user and system), so
that other load on the machine counts little; each side makes one epoch to warm up and then one that is measured. Checked: an
epoch of each holds the same number of tokens with the same sum of ids.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.measuring import close, hardware, result
from benchmarks.peers import python_with
from benchmarks.token_corpus import token_corpus
from pipelines.loading import Index, Loader
from pipelines.shards.dataset import Dataset

SYSTEMS = {
    "litdata": "litdata 0.2.76",
    "streaming": "mosaicml-streaming 0.13.0",
    "datasets": "datasets with DataLoader",
}
PACKAGES = (
    "litdata==0.2.76", "mosaicml-streaming==0.13.0", "lightning-utilities", "zstd", "zstandard", "brotli",
    "python-snappy", "cramjam", "xxhash", "catalogue", "tifffile",
)  # fmt: skip


def _loader(index: Index) -> Loader:
    return Loader(
        index, sequences=8, micro_batch=8, seed=1, window_tokens=16_000_000, endless=False, prefetch=0, workers=0
    )


def ours(dataset: Dataset) -> dict[str, Any]:
    """An epoch after one that warms up: seconds, tokens, padding, and the sum of all ids but those of padding."""
    index = Index.build(dataset, 4096)
    list(_loader(index))
    began, wall = time.process_time(), time.perf_counter()
    tokens = slots = 0
    for step in _loader(index):
        tokens, slots = tokens + step.tokens, slots + step.slots
    measured = {"cpu_s": time.process_time() - began, "wall_s": time.perf_counter() - wall}
    total = 0
    for step in _loader(index):
        ids = int(step.micro_batches[0].token_ids.sum(dtype=torch.int64))
        total += ids - (step.slots - step.tokens) * dataset.vocabulary.end
    return measured | {"tokens": tokens, "padding": 1 - tokens / slots, "sum": total}


def restore(dataset: Dataset, tokens: int = 1_000_000_000) -> dict[str, float]:
    """Seconds until the next batch at a token far into the run, and bytes of the state."""
    index = Index.build(dataset, 4096)
    settings: dict[str, Any] = {"micro_batch": 8, "seed": 1, "window_tokens": 16_000_000, "prefetch": 0, "workers": 0}
    # Large global batches get there sooner; the place is the same one, because it is counted in sequences.
    skipping = Loader(index, sequences=8, **settings)
    state = skipping.state_dict()
    one = Loader(index, sequences=8, endless=False, **settings)
    per_epoch = sum(1 for _ in one) * 8 * 4096
    key = next(iter(skipping._components))
    state["streams"] = {key: [tokens // per_epoch, 0, 8]}
    state["taken"] = {key: tokens // 4096}
    began, wall = time.process_time(), time.perf_counter()
    loader = Loader(index, sequences=8, **settings)
    loader.load_state_dict(state)
    next(loader)
    return {
        "cpu_s": time.process_time() - began,
        "wall_s": time.perf_counter() - wall,
        "state_bytes": len(json.dumps(loader.state_dict())),
    }


def theirs(system: str, mode: str, dataset: Dataset, scratch: Path) -> dict[str, Any]:
    python = python_with("loaders", *PACKAGES, beside=True)
    done = subprocess.run(
        [python, "benchmarks/peer/loaders.py", system, f"{dataset.uri}/shards", scratch / f"{system}-{mode}", mode],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},  # it packs as we do
    )
    if done.returncode:
        raise SystemExit(f"{system} {mode}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmarks"))
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--quick", action="store_true", help="20 M tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    dataset = token_corpus(arguments.folder, 20_000_000 if arguments.quick else arguments.tokens)
    stored = sum(shard.size for shard in dataset.shards())
    mine = ours(dataset)
    rate = mine["tokens"] / mine["cpu_s"] / 1e6
    print(
        f"{mine['tokens']:,} tokens at {stored / mine['tokens']:.2f} bytes, {mine['padding']:.2%} padding; {rate:.1f} M/s "
        f"of its own time, {mine['tokens'] / mine['wall_s'] / 1e6:.1f} M/s by the clock",
        flush=True,
    )
    results = []
    for mode in ("whole", "raw"):
        for system, name in SYSTEMS.items():
            told = theirs(system, mode, dataset, arguments.folder / "loaders")
            checked = "raw mode: other work, shown beside"
            if mode == "whole":
                if (told["documents_tokens"], told["sum"]) != (mine["tokens"], mine["sum"]):
                    raise SystemExit(f"{name}: {told['documents_tokens']:,} tokens of sum {told['sum']:,}, ours {mine}")
                checked = f"{mine['tokens']:,} tokens in an epoch of both, sums of ids equal"
            what = f"batches of 8 x 4096 on one core: our loader, whole / {name}, {mode}"
            results.append(result(what, rate, told["tokens"] / told["cpu_s"] / 1e6, "M tokens/s", checked=checked))
            print(results[-1], flush=True)
    again = restore(dataset)
    results.append(
        {
            "what": "from a saved state at token 1 B to the next batch (goal 1 s)",
            "ours": round(again["cpu_s"], 3),
            "theirs": 1.0,
            "unit": "s",
            "ratio": round(again["cpu_s"], 3),
            "hardware": hardware(),
            "checked": f"state of {again['state_bytes']} bytes; {again['wall_s']:.2f} s by the clock",
        }
    )
    print(results[-1])
    close(results)


if __name__ == "__main__":
    main()
