"""A tiny pretraining on the test cluster, disturbed: what its tests and its campaign share."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.launch import launch, pretrain_task
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from slurm.settings import ClusterRecipe
from slurm.submission import JobHandle
from tests.pipelines.corpora import make_dataset
from tests.pipelines.training import TINY
from tests.slurm.cluster import Cluster

RANKS = {"nodes": 2, "tasks_per_node": 2}


def cluster_recipe(**changes: Any) -> ClusterRecipe:
    """Two nodes of two tasks."""
    return ClusterRecipe.model_validate({"partition": "main", "time": "10", "signal_before_s": 60, **RANKS, **changes})


def training_recipe(dataset: Path, output: Path, **changes: Any) -> PretrainRecipe:
    """A tiny model; a step takes some 100 ms on two nodes of two tasks."""
    values: dict[str, Any] = TINY | {
        "output": str(output),
        "data": {"dataset": str(dataset), "sequence_length": 96},
        "batch": {"sequences": 8, "micro_batch": 2},
        # Over half a minute after a disturbance on any machine: SLURM looks at time limits that seldom.
        "steps": 600,
        "checkpoints": {"every": 20},
        "logging": {"every": 5, "tensorboard": False},
    }
    return PretrainRecipe.model_validate(values | changes)


def dataset(folder: Path) -> Path:
    """Some documents of all modalities."""
    make_dataset(folder / "tokens", units=3, rows=30)
    return folder / "tokens"


def submit(recipe: PretrainRecipe, **changes: Any) -> JobHandle:
    """What `braid pretrain --on slurm` does."""
    return launch([pretrain_task(recipe)], cluster_recipe(**changes))


def steps_done(run: Path) -> int:
    """The last step that the run has written down."""
    try:
        train = read_metrics(run / "metrics.jsonl", "train")
    except FileNotFoundError:
        return 0
    return int(train[-1]["step"]) if train else 0


def await_(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for something, or fail naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s:g} s: {what}"
        time.sleep(0.1)


def job_state(cluster: Cluster, job: JobHandle) -> str:
    """As the controller says it, such as RUNNING."""
    # Of nodes of several kinds each has a line; the first counts.
    return cluster.run("squeue", "-h", "-j", job.id, "-t", "all", "-o", "%T").partition("\n")[0].strip()


def await_end(cluster: Cluster, job: JobHandle, timeout_s: float = 420) -> str:
    """The state in which a job ends."""
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}
    state = ""

    def done() -> bool:
        nonlocal state
        state = job_state(cluster, job)
        return state in ended

    await_(done, timeout_s, f"job {job.id} has not ended: {logs(job)}")
    return state


def logs(job: JobHandle) -> str:
    """The end of what every task says."""
    return "".join(f"\n== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(job.folder.glob("*.out")))


def weights(run: Path) -> str:
    """A hash of the trained weights."""
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


def faults(run: Path, undisturbed: Path) -> list[str]:
    """What is different about a run that was disturbed: its weights, or what it wrote down."""
    found = []
    if weights(run) != weights(undisturbed):
        found.append("other weights")
    here, there = (_losses(folder) for folder in (run, undisturbed))
    counted = Counter(step for step, _ in here)
    if twice := [step for step, count in counted.items() if count > 1]:
        found.append(f"steps {twice} stand there twice")
    if here != there:
        found.append("other steps or losses")
    if not json.loads((run / "finished.json").read_bytes())["steps"]:
        found.append("no end")
    return found


def _losses(run: Path) -> list[tuple[int, Any]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl", "train")]
