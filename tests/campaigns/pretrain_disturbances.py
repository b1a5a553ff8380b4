"""Disturb pretraining on a real SLURM again and again, and compare what it ends with to an undisturbed run.

    python -m tests.campaigns.pretrain_disturbances --disturbances 10 --seed 1 --log docs/campaigns/pretrain_disturbances.md

A run of two nodes with two tasks each is submitted by the command line and disturbed at random steps: a job of higher
priority takes its nodes, its time limit comes, somebody requeues it, a node (that of the first rank or the other one)
loses power. A trial brings one to three disturbances of one run. When it has ended, its weights must equal the undisturbed
run's bit by bit, its metrics must hold every step once with the same losses, and `braid jobs show` must tell as many starts
as there were, each with the right cause.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from pipelines.pretrain.recipe import PretrainRecipe
from tests.slurm.cluster import Cluster, unavailable
from tests.slurm.training import await_, dataset, faults, steps_done, training_recipe

KINDS = ("preemption", "requeue", "crash of the first node", "crash of another node", "time limit")
CAUSES = {
    "preemption": "a job of higher priority took its nodes",
    "requeue": "it was taken back",
    "crash of the first node": "a node failed",
    "crash of another node": "a node failed",
    "time limit": "its time was nearly over",
}
"""What `braid jobs show` must say of each."""

STEPS = 160
LIMIT_MIN = 60
SETTINGS = (
    "slurm.partition=main",
    f"slurm.time={LIMIT_MIN}",
    "slurm.signal_before_s=60",
    "slurm.nodes=2",
    "slurm.tasks_per_node=2",
    "slurm.cpus_per_task=1",
)


@dataclass(kw_only=True)
class Disturbance:
    """What happens to a run, and when."""

    kind: str
    step: int
    """When the run has written so many steps."""

    def __str__(self) -> str:
        return f"{self.kind} after step {self.step}"


class Campaign:
    """An undisturbed run, and trials against it."""

    def __init__(self, cluster: Cluster, folder: Path, seed: int) -> None:
        self.cluster, self.folder = cluster, folder
        self.random = random.Random(seed)
        self.dataset = dataset(folder)
        job = self._submit(self._recipe("undisturbed"))
        self._wait(job)
        self.undisturbed = folder / "undisturbed"

    def plan(self, disturbances: int) -> Iterator[list[Disturbance]]:
        """Trials with so many disturbances in all; every kind in turn."""
        kinds: list[str] = []
        while len(kinds) < disturbances:
            kinds += self.random.sample(KINDS, len(KINDS))
        kinds = kinds[:disturbances]
        while kinds:
            count = min(self.random.choice((1, 2, 3)), len(kinds))
            steps = sorted(self.random.sample(range(8, STEPS - 20), count))
            yield [Disturbance(kind=kinds.pop(0), step=step) for step in steps]

    def trial(self, name: str, disturbances: list[Disturbance]) -> str:
        """Run and disturb; what is wrong, or ""."""
        recipe = self._recipe(name)
        job = self._submit(recipe)
        run = Path(recipe.output)
        for disturbance in disturbances:
            await_(lambda step=disturbance.step: steps_done(run) >= step, 400, f"step {disturbance.step}")  # type: ignore[misc]
            self._disturb(job, disturbance.kind)
        self._wait(job)
        found = faults(run, self.undisturbed)
        return "; ".join(found) or self._told(job, disturbances)

    def _disturb(self, job: str, kind: str) -> None:
        before = self._starts(job)
        if kind == "preemption":
            self.cluster.run("sbatch", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
        elif kind == "time limit":
            # The limit is drawn near, so that all starts of a run may have one that suits its other disturbances.
            self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={self._minutes(job) + 2}")
        elif kind == "requeue":
            self.cluster.run("scontrol", "requeue", job)
        else:
            ranks = self.cluster.run("scontrol", "show", "hostnames", self._nodes(job)).split()
            victim = ranks[0] if kind == "crash of the first node" else ranks[1]
            self.cluster.crash(victim)
        await_(lambda: self._starts(job) > before, 300, f"a start after {kind}")
        if kind == "time limit":
            self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={LIMIT_MIN}")
        if "crash" in kind:
            self.cluster.revive(victim)

    def _told(self, job: str, disturbances: list[Disturbance]) -> str:
        """Whether `braid jobs show` tells the true story; what is wrong with it, or ""."""
        shown = self._braid("jobs", "show", job, "--json")
        story: dict[str, Any] = json.loads(shown)
        said = [attempt["why"] for attempt in story["attempts"][:-1]]
        for disturbance in disturbances:
            cause = CAUSES[disturbance.kind]
            if not any(cause in why for why in said):
                return f"braid jobs show does not tell of the {disturbance.kind}: {said}"
        known = set(CAUSES.values())
        if wrong := [why for why in said if not any(cause in why for cause in known)]:
            return f"braid jobs show says {wrong}"
        if len(said) != len(disturbances):
            return f"{len(said)} restarts are told, {len(disturbances)} were caused"
        return "" if story["state"] == "COMPLETED" else f"state {story['state']}"

    def _recipe(self, name: str) -> PretrainRecipe:
        return training_recipe(self.dataset, self.folder / name, steps=STEPS)

    def _submit(self, recipe: PretrainRecipe) -> str:
        file = Path(f"{recipe.output}.yaml")
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        return self._braid("pretrain", str(file), "--on", "slurm", *SETTINGS).split()[1]

    def _braid(self, *arguments: str) -> str:
        return self.cluster.run(sys.executable, "-m", "pipelines.cli", *arguments, timeout_s=120)

    def _wait(self, job: str) -> None:
        self.cluster.run(sys.executable, "-m", "pipelines.cli", "jobs", "wait", job, timeout_s=600)

    def _nodes(self, job: str) -> str:
        return self.cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()

    def _minutes(self, job: str) -> int:
        """That the job has run, rounded down."""
        hours, minutes, _ = f"0:0:{self.cluster.run('squeue', '-h', '-j', job, '-o', '%M').strip()}".split(":")[-3:]
        return int(hours) * 60 + int(minutes)

    def _starts(self, job: str) -> int:
        pattern = f"*/jobs/*/attempt-{job}-*.json"
        return len(list(self.folder.glob(pattern)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disturbances", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    if reason := unavailable():
        sys.exit(reason)
    began, wrong, rows = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder, Cluster() as cluster:
        campaign = Campaign(cluster, Path(folder), arguments.seed)
        for number, disturbances in enumerate(campaign.plan(arguments.disturbances), start=1):
            try:
                fault = campaign.trial(f"t{number}", disturbances)
            except (AssertionError, RuntimeError, subprocess.TimeoutExpired) as error:
                fault = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(f"| {number} | {'; '.join(map(str, disturbances))} | {fault or 'equal, and truly told'} |")
            print(rows[-1], flush=True)
            if fault:
                wrong.append(f"trial {number}: {fault}")
                log = next((Path(folder) / f"t{number}/jobs").glob("*/*_0_log.out"), None)
                print(log.read_text(errors="replace")[-3000:] if log else "no log", flush=True)
    minutes = (time.monotonic() - began) / 60
    text = (
        "# Disturbances of pretraining on SLURM\n\n"
        f"{date.today()}, `python -m tests.campaigns.pretrain_disturbances --disturbances {arguments.disturbances} --seed "
        f"{arguments.seed}`, {minutes:.0f} min on {os.cpu_count()} cores; two nodes of two tasks, gloo, "
        f"{STEPS} steps. Faults: {len(wrong)}.\n\n| trial | disturbances | weights, steps and losses against the undisturbed "
        "run's, and what `braid jobs show` tells |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        arguments.log.write_text(text, encoding="utf-8")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
