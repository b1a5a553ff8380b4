"""Kill a tokenize job again and again, and compare what it leaves with an undisturbed run's.

    python -m tests.campaigns.tokenize_kills --kills 60 --seed 1 --log docs/campaigns/tokenize_kills.md

Every trial starts a job on a new dataset and kills one of its processes with SIGKILL: the driver or a worker at a named
place (`pipelines.crash`), or the driver, a worker or Ray's raylet at a random moment. A job that ended is started again,
as its user would; a trial may bring up to three kills. When the job has ended well, the dataset must have the hash of the
undisturbed run's, `verify` must find no fault, and `vacuum` must leave it readable.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pipelines.crash import POINTS
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.verify import verify
from tests.pipelines.tiny import write_corpus, write_recipe

MOST_STARTS = 8
WORKER_POINTS = ("before_write", "after_write", "after_publish")
VICTIMS = {"driver": "pipelines.cli", "worker": "ray::UnitWorker", "raylet": "raylet/raylet"}
"""What the command line of each holds."""


@dataclass(kw_only=True)
class Kill:
    """One kill: at a named place, or of a victim some time after the start."""

    victim: str
    point: str = ""
    count: int = 1
    after_s: float = 0.0
    landed: bool = False

    def __str__(self) -> str:
        where = f"at {self.point}, pass {self.count}" if self.point else f"after {self.after_s:.1f} s"
        return f"{self.victim} {where}"


class Campaign:
    """A corpus, the hash of an undisturbed run, and trials against it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        write_corpus(folder, stamps=24, lines=40)
        self.recipe = write_recipe(folder)
        began = time.monotonic()
        self._start("undisturbed").wait()
        self.seconds = time.monotonic() - began
        self.expected = dataset_hash(Dataset.open(folder / "undisturbed"))

    def kills(self) -> Iterator[Kill]:
        """An endless plan: every named place in turn, then random moments."""
        while True:
            for point in self.random.sample(POINTS, len(POINTS)):
                victim = "worker" if point in WORKER_POINTS else "driver"
                yield Kill(victim=victim, point=point, count=self.random.choice((1, 1, 2, 3)))
                moment = self.random.uniform(0.2, 1.0) * self.seconds
                yield Kill(victim=self.random.choice(("driver", "worker", "worker", "raylet")), after_s=moment)

    def trial(self, name: str, kills: list[Kill]) -> str:
        """Run a job with kills until it ends well, which may be before the last of them; what is wrong, or ""."""
        for start in range(MOST_STARTS):
            if self._run_with(name, kills[start] if start < len(kills) else None) == 0:
                return self._fault(name)
        return f"the job did not end well in {MOST_STARTS} starts"

    def _run_with(self, name: str, kill: Kill | None) -> int:
        once = self.folder / f"once-{uuid.uuid4().hex}"
        environment: dict[str, str] = {}
        if kill and kill.point:
            once.touch()
            environment["BRAID_CRASH"] = f"{kill.point}:{kill.count}:{once}"
        marker = uuid.uuid4().hex
        process = self._start(name, marker=marker, **environment)
        if kill and not kill.point:
            deadline = time.monotonic() + kill.after_s
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.01)
            kill.landed = _kill_one(marker, kill.victim, self.random)
        code = process.wait(timeout=180)
        if kill and kill.point:
            kill.landed = not once.exists()
            once.unlink(missing_ok=True)
        _end_all(marker)
        return code

    def _start(self, name: str, *, marker: str = "", **environment: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "tokenize", str(self.recipe), f"dataset={self.folder / name}"],
            stdout=log,
            stderr=log,
            env={**os.environ, "BRAID_TRIAL": marker, **environment},
        )

    def _fault(self, name: str) -> str:
        dataset = Dataset.open(self.folder / name)
        if faults := list(verify(dataset)):
            return f"verify: {faults[0]}"
        found = dataset_hash(dataset)
        if found != self.expected:
            return f"the dataset's hash is {found}, not {self.expected}"
        return _vacuum(self.folder / name, self.expected)


def _vacuum(folder: Path, expected: str) -> str:
    command = [sys.executable, "-m", "pipelines.cli", "vacuum", str(folder), "--older-than-hours", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"vacuum: {done.stderr[-500:]}"
    left = [p.name for p in (folder / "shards").iterdir() if p.is_file()]
    held = {shard.name for shard in Dataset.open(folder).shards()}
    if set(left) != held:
        return f"vacuum left {sorted(set(left) - held)}"
    return "" if dataset_hash(Dataset.open(folder)) == expected else "vacuum changed the dataset"


def _processes(marker: str) -> Iterator[tuple[int, str]]:
    """Processes of one job, with their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"BRAID_TRIAL={marker}".encode() in (entry / "environ").read_bytes():
                    yield (
                        int(entry.name),
                        (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                    )
            except (OSError, ValueError):
                # It has just ended.
                continue


def _kill_one(marker: str, victim: str, rng: random.Random) -> bool:
    found = [pid for pid, command in _processes(marker) if VICTIMS[victim] in command]
    if not found:
        return False
    try:
        os.kill(rng.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _end_all(marker: str) -> None:
    """What a killed driver leaves of its Ray ends by itself, but later than the next start."""
    while found := [pid for pid, _ in _processes(marker)]:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def run(kills: int, seed: int, report: list[str]) -> list[str]:
    """Bring so many kills to land; the faults that were found."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed)
        plan = campaign.kills()
        landed = trial = 0
        while landed < kills:
            trial += 1
            chosen = [next(plan) for _ in range(campaign.random.randint(1, 3))]
            fault = campaign.trial(f"t{trial}", chosen)
            chosen = [kill for kill in chosen if kill.landed]
            landed += len(chosen)
            report.append(f"| {trial} | {'; '.join(map(str, chosen)) or 'none landed'} | {fault or 'equal'} |")
            print(f"{landed}/{kills} {report[-1]}", flush=True)
            if fault:
                faults.append(f"trial {trial}: {fault}")
                log = Path(folder) / f"t{trial}.log"
                print(log.read_text(errors="replace")[-3000:], flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    report: list[str] = []
    began = time.monotonic()
    faults = run(arguments.kills, arguments.seed, report)
    kinds = Counter(
        kill.partition(" ")[0] + (" at a named place" if " at " in kill else " at a random moment")
        for line in report
        for kill in line.split("|")[2].strip().split("; ")
        if kill != "none landed"
    )
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    text = (
        "# Kills of the tokenize job\n\n"
        f"{date.today()}, `python -m tests.campaigns.tokenize_kills --kills {arguments.kills} --seed {arguments.seed}`, "
        f"{(time.monotonic() - began) / 60:.0f} min on {os.cpu_count()} cores. {sum(kinds.values())} kills landed: "
        f"{counted}. Faults: {len(faults)}.\n\n| trial | kills | dataset against the undisturbed run's |\n|---|---|---|\n"
        + "\n".join(report)
        + "\n"
    )
    if arguments.log:
        arguments.log.write_text(text, encoding="utf-8")
    print(text.split("\n\n")[1])
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
