"""Runs on 8, 4, 2 and 1 ranks: equal losses, checkpoints that any number goes on from, ranks that die.

    python -m tests.campaigns.many_ranks --ranks 8 [--device cuda] [--log docs/campaigns/many_ranks.md]

Every run is a whole pretraining run of a tiny model (`pipelines.pretrain.main`), each rank a process of its own without a
launcher, as `srun` starts them. Three parts:

    losses   every sharding of `SETTINGS` on 2, 4 and 8 ranks: losses of every step within 1e-5 of one process's (on GPUs,
             where products are rounded otherwise, within 1e-3)
    resume   a checkpoint of all ranks, gone on from with half, a quarter, ... and one: losses agree with the first run's
    killed   one rank is killed, or stopped so that it hangs: all others end within the stated time, stacks written where one
             waited for nothing; the same command goes on and ends with the losses of an undisturbed run

With NCCL the part `killed` is the one that matters; with gloo the ranks that are left see closed connections at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from pipelines.pretrain.checkpoint import list_checkpoints
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import dump_recipe
from tests.pipelines.corpora import make_dataset

STEPS = 12
SAVED = 8
"""The checkpoint that is gone on from."""
HANG_S = 15
"""A rank that waits so long ends, its stacks written down."""
ROOT = Path(__file__).parents[2]

SETTINGS: dict[str, dict[str, Any]] = {
    "FSDP": {},
    "kept after forward": {"sharding": {"reshard_after_forward": False}},
    "kept for a step": {"sharding": {"reshard_after_forward": False, "reshard_after_backward": False}},
    "prefetch 2": {"sharding": {"prefetch": 2}},
    "HSDP of 2": {"sharding": {"dp_shard": 2}},
    "recomputed": {"recompute_every": 1},
}

Curve = list[tuple[int, dict[str, float]]]


class Runs:
    """Runs in a folder, all on one dataset."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        make_dataset(folder / "tokens", units=3, rows=30)
        (folder / "train.py").write_text("import sys; from pipelines.pretrain import main; main(sys.argv[1])")

    def recipe(self, name: str, **changes: Any) -> PretrainRecipe:
        values = {
            "output": str(self.folder / name),
            "data": {"dataset": str(self.folder / "tokens"), "sequence_length": 96},
            "model": {"hidden_size": 32, "num_layers": 3, "num_attention_heads": 2, "ffn_hidden_size": 64},
            "optimizer": {"learning_rate": 3e-3},
            "schedule": {"warmup_steps": 2},
            "batch": {"sequences": 16, "micro_batch": 1},
            "steps": STEPS,
            "precision": "fp32",
            "checkpoints": {"every": 4},
            "validation": {"every": 6},
            "logging": {"every": 1, "tensorboard": False},
            "faults": {"hang_s": HANG_S},
            "device": self.device,
            "threads": 1,
        }
        return PretrainRecipe.model_validate(values | changes)

    def start(self, name: str, ranks: int, **changes: Any) -> list[subprocess.Popen[bytes]]:
        """Its ranks; what they say is in NAME-rank-N.log."""
        file = self.folder / f"{name}.yaml"
        file.write_text(dump_recipe(self.recipe(name, **changes)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(ranks):
            environment = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            with (self.folder / f"{name}-rank-{rank}.log").open("ab") as log:
                command = [sys.executable, str(self.folder / "train.py"), str(file)]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return processes

    def run(self, name: str, ranks: int, **changes: Any) -> Curve:
        """A run to its end.

        Raises:
            RuntimeError: a rank failed; the message has its last words.
        """
        for rank, process in enumerate(self.start(name, ranks, **changes)):
            if process.wait(timeout=300):
                raise RuntimeError(f"{name}, rank {rank}: {self.said(name, rank)[-1500:]}")
        return self.curve(name)

    def said(self, name: str, rank: int) -> str:
        return (self.folder / f"{name}-rank-{rank}.log").read_text(errors="replace")

    def curve(self, name: str) -> Curve:
        return [(r["step"], r["loss"]) for r in read_metrics(self.folder / name / "metrics.jsonl", "train")]

    def steps_done(self, name: str) -> int:
        metrics = self.folder / name / "metrics.jsonl"
        return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0

    def copy_before_the_end(self, name: str, other: str) -> None:
        """A run that has the checkpoint of step `SAVED` and none after it."""
        shutil.copytree(self.folder / name, self.folder / other)
        (self.folder / other / "finished.json").unlink()
        shutil.rmtree(self.folder / other / "model")
        for path in list_checkpoints(self.folder / other / "checkpoints"):
            if path.name != f"step-{SAVED:08d}":
                shutil.rmtree(path)


def largest_difference(ours: Curve, theirs: Curve) -> float:
    """Relative, over all steps and modalities; infinite if the steps are others."""
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        return float("inf")
    return max(
        abs(one[name] - other[name]) / abs(other[name])
        for (_, one), (_, other) in zip(ours, theirs, strict=True)
        for name in other
    )


def losses(runs: Runs, worlds: list[int], settings: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """(what, largest difference from one process)."""
    alone = runs.run("alone", 1)
    for world in worlds:
        for setting, changes in settings.items():
            if world % changes.get("sharding", {}).get("dp_shard", 1):
                continue
            name = f"{setting.replace(' ', '-')}-{world}"
            yield f"{setting}, {world} ranks", largest_difference(runs.run(name, world, **changes), alone)


def resume(runs: Runs, ranks: int, setting: str) -> list[tuple[str, float]]:
    """(what, largest difference from the run that saved)."""
    changes = SETTINGS[setting]
    first = runs.run("saved", ranks, **changes)
    found = []
    world = ranks // 2
    while world:
        name = f"resumed-{world}"
        runs.copy_before_the_end("saved", name)
        # Fewer ranks may hold one copy only: what shards a run may differ between its starts.
        theirs = changes if world % changes.get("sharding", {}).get("dp_shard", 1) == 0 else {}
        curve = runs.run(name, world, **theirs)
        assert f"Going on from step {SAVED}" in runs.said(name, 0), runs.said(name, 0)[-1500:]
        found.append((f"saved on {ranks}, gone on with {world}", largest_difference(curve, first)))
        world //= 2
    return found


def killed(runs: Runs, ranks: int, number: signal.Signals) -> tuple[float, list[str], float]:
    """One rank gets a signal in the middle of a run, and the run is started again.

    Returns:
        Seconds until all others were gone; for each of them, how it ended; the largest difference from an undisturbed run.
    """
    if not (runs.folder / "undisturbed" / "finished.json").exists():
        runs.run("undisturbed", ranks)
    name = f"hit-{number.name}"
    processes = runs.start(name, ranks)
    while runs.steps_done(name) < SAVED // 2 + 1:
        assert all(p.poll() is None for p in processes), "".join(runs.said(name, r)[-800:] for r in range(ranks))
        time.sleep(0.005)
    victim, others = processes[-1], processes[:-1]
    victim.send_signal(number)
    began = time.monotonic()
    try:
        for process in others:
            process.wait(timeout=10 * HANG_S)
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ends = [_end(runs, name, rank) for rank in range(ranks - 1)]
    curve = runs.run(name, ranks)
    return took, ends, largest_difference(curve, runs.curve("undisturbed"))


def _end(runs: Runs, name: str, rank: int) -> str:
    """How a rank ended: with its stacks, or with an error that names what it was doing."""
    stacks = runs.folder / name / ".stacks" / f"rank-{rank}.txt"
    if stacks.exists() and "most recent call first" in stacks.read_text():
        return "stacks"
    said = runs.said(name, rank)
    if "LostRanksError" in said and "Traceback" in said:
        return "lost ranks"
    return f"without a word: {said[-300:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", default="losses,resume,killed")
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    tolerance = 1e-5 if arguments.device == "cpu" else 1e-3
    worlds = [n for n in (2, 4, 8, 16) if n <= arguments.ranks]
    rows: list[str] = []
    faults: list[str] = []

    def tell(what: str, said: str, good: bool) -> None:
        rows.append(f"| {what} | {said} |")
        print(rows[-1], flush=True)
        if not good:
            faults.append(f"{what}: {said}")

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments.device)
        if "losses" in arguments.parts:
            for what, difference in losses(runs, worlds, SETTINGS):
                tell(what, f"losses within {difference:.1e} of one process", difference <= tolerance)
        if "resume" in arguments.parts:
            for what, difference in resume(runs, arguments.ranks, "HSDP of 2"):
                tell(what, f"losses within {difference:.1e}", difference <= tolerance)
        if "killed" in arguments.parts:
            for number in (signal.SIGKILL, signal.SIGSTOP):
                took, ends, difference = killed(runs, arguments.ranks, number)
                ended = ", ".join(f"{ends.count(end)} x {end}" for end in dict.fromkeys(ends))
                said = f"others gone after {took:.1f} s ({ended}); gone on, losses within {difference:.1e}"
                good = took < 2 * HANG_S + 60 and not any(e.startswith("without") for e in ends)
                tell(f"{number.name}, {arguments.ranks} ranks", said, good and difference <= tolerance)
    if arguments.log:
        arguments.log.write_text(_page(arguments, rows, faults, time.monotonic() - began), "utf-8")
    if faults:
        sys.exit("\n".join(faults))


def _page(arguments: argparse.Namespace, rows: list[str], faults: list[str], seconds: float) -> str:
    return (
        "# Many ranks\n\n"
        f"{date.today()}, `python -m tests.campaigns.many_ranks --ranks {arguments.ranks} --device {arguments.device} "
        f"--parts {arguments.parts}`, {seconds / 60:.0f} min on {os.cpu_count()} cores. Faults: {len(faults)}. A rank that "
        f"waits ends after {HANG_S} s.\n\n| what | what came of it |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
