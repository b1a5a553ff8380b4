"""A fortnight of a recurring pipeline in some minutes: inputs come, ticks come or not, and much goes wrong.

    python -m tests.campaigns.recurring_fortnight --days 14 --seed 1 --log docs/campaigns/recurring_fortnight.md

Every day texts arrive, some late, some changed, some corrupt or mended. Ticks are missed, doubled, concurrent, killed
with SIGKILL at a named place (`pipelines.crash`) or a random moment, or put to sleep until another has taken over; a
step's process is killed alone; for two days the tokenizer is gone, so that the tokenize step fails; one day the pipeline
is paused. At the end: the dataset has the hash of one made at once from what lies there; the stages, trained again
undisturbed on the same versions, give the same weights; no step is counted twice; every run has one record, no two ran at
once, and the records' sums are the dataset's.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from pipelines.crash import PIPELINE_POINTS, POINTS
from pipelines.pretrain.loop import run as pretrain
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.stages import claim_stage, read_stages, stage_recipe
from pipelines.recurring.lease import read_holder
from pipelines.recurring.recipe import pretrain_recipe, tokenize_recipe
from pipelines.recurring.state import Record
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.shards.verify import verify
from tests.campaigns.tokenize_kills import _end_all, _processes
from tests.pipelines.jobs import run_units, stored
from tests.pipelines.nightly import STEPS, Nightly

KINDS = ("one", "one", "missed", "doubled", "concurrent", "killed at a place", "killed", "step killed", "asleep")
MOST_TICKS = 12
"""Undisturbed ticks after the last day until nothing is to do."""


@dataclass
class Day:
    """What happened on one day, for the log."""

    number: int
    inputs: str
    ticks: str
    said: str


class Fortnight:
    """A pipeline, its inputs, and what is done to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.nightly = Nightly(
            folder,
            {"d00-0": "the quick fox of the first day"},
            retries={"attempts": 2, "wait_s": 1.0, "runs": 3, "lost_runs": 50},
        )
        self.valid: dict[str, str] = {"d00-0": "the quick fox of the first day"}
        self.corrupt: set[str] = set()
        self.kills = 0
        self.days: list[Day] = []

    def day(self, number: int, kinds: list[str], *, failing: bool, paused: bool) -> None:
        inputs = [self._arrive(number)]
        model = self.nightly.folder / "text.model"
        if failing:
            model.rename(model.with_suffix(".away"))
        if paused:
            self.nightly.state.pause("campaign", "a paused day")
        said = []
        for nth, kind in enumerate(kinds):
            if nth:
                # So that there is something to disturb.
                inputs.append(self._arrive(number))
            said.append(self._tick(kind))
        if failing:
            model.with_suffix(".away").rename(model)
        if paused:
            assert "paused by campaign" in said[0], said
            self.nightly.state.resume()
        marks = [*(["tokenizer gone"] if failing else []), *(["paused"] if paused else [])]
        self.days.append(Day(number, "; ".join(inputs), ", ".join([*kinds, *marks]), "; ".join(said)))
        print(self.days[-1], flush=True)

    def finish(self) -> None:
        """Tick until nothing is to do."""
        for _ in range(MOST_TICKS):
            code, said = self.nightly.call("tick")
            if "nothing to do" in said:
                return
            assert code == 0, said
        raise AssertionError("there is always something to do")

    def _arrive(self, number: int) -> str:
        """New, late, changed, corrupt and mended inputs."""
        rng, did = self.random, Counter[str]()
        names = [f"d{number:02}-{rng.randrange(10**6):06}" for _ in range(rng.randint(1, 4))]
        did["new"] = len(names)
        if rng.random() < 0.4 and number > 1:
            names.append(f"d{rng.randrange(number):02}-late-{number}-{rng.randrange(10**6):06}")
            did["late"] += 1
        if rng.random() < 0.5:
            names.append(rng.choice(sorted(self.valid)))
            did["changed"] += 1
        if self.corrupt and rng.random() < 0.5:
            names.append(rng.choice(sorted(self.corrupt)))
            did["mended"] += 1
        for name in names:
            text = f"the fox {name} of day {number} jumps {rng.randint(0, 999)} times"
            self.nightly.write(name, text)
            self.valid[name] = text
            self.corrupt.discard(name)
        if rng.random() < 0.4:
            bad = f"d{number:02}-bad-{rng.randrange(10**6):06}"
            self.nightly.write(bad, b"caf\xe9 " * rng.randint(1, 9))
            self.corrupt.add(bad)
            did["corrupt"] += 1
        return ", ".join(f"{count} {kind}" for kind, count in did.items())

    def _tick(self, kind: str) -> str:
        if kind == "missed":
            return "-"
        if kind == "one":
            return self._short(self.nightly.call("tick"))
        if kind == "doubled":
            return " + ".join(self._short(self.nightly.call("tick")) for _ in range(2))
        if kind == "concurrent":
            both = [self.nightly.start("tick") for _ in range(2)]
            said = [(p.wait(), p.communicate()[0]) for p in both]
            held = [text for _, text in said if "the lease in" in text]
            assert len(held) <= 1, said
            return " | ".join(map(self._short, said))
        return self._disturbed(kind)

    def _disturbed(self, kind: str) -> str:
        marker = uuid.uuid4().hex
        once = self.nightly.folder / f"once-{marker}"
        environment = {"BRAID_TRIAL": marker}
        if kind == "killed at a place":
            once.touch()
            point = self.random.choice((*PIPELINE_POINTS, *POINTS))
            environment["BRAID_CRASH"] = f"{point}:1:{once}"
            kind = f"killed at {point}"
        process = self.nightly.start("tick", **environment)
        if not once.exists():
            until = time.monotonic() + self.random.uniform(0.5, 25.0)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.02)
        if kind == "killed":
            process.kill()
        elif kind == "step killed":
            steps = [pid for pid, command in _processes(marker) if "pipelines.recurring.step" in command]
            for pid in steps[:1]:
                os.kill(pid, signal.SIGKILL)
                self.kills += 1
        elif kind == "asleep" and process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(4.0)  # Longer than `ttl_s`.
            other = self._short(self.nightly.call("tick"))
            process.send_signal(signal.SIGCONT)
            code, said = process.wait(), process.communicate()[0]
            self.kills += 1
            return f"asleep ({self._short((code, said))}), other: {other}"
        code = process.wait()
        said = process.communicate()[0]
        if kind.startswith("killed") and code == -signal.SIGKILL:
            self.kills += 1
        elif once.exists():
            once.unlink()
            kind += " (never came by)"
        else:
            self.kills += kind.startswith("killed at")
        _end_all(marker)
        return f"{kind}: {self._short((code, said)) if code >= 0 else 'dead'}"

    @staticmethod
    def _short(result: tuple[int, str]) -> str:
        code, said = result
        words = " ".join(said.removeprefix("nightly: ").split())
        return f"[{code}] {words[:70]}"

    def faults(self) -> list[str]:
        """What is wrong at the end; nothing, if all is well."""
        found: list[str] = []
        found += self._dataset_faults()
        found += self._training_faults()
        found += self._history_faults()
        if (holder := read_holder(self.nightly.state.lease)) is not None:
            found.append(f"the lease is held: {holder}")
        return found

    def _dataset_faults(self) -> list[str]:
        found: list[str] = []
        recipe = tokenize_recipe(self.nightly.recipe)
        dataset = Dataset.open(recipe.dataset)
        found += [f"verify: {fault}" for fault in verify(dataset)]
        rows = {Path(name).stem for name in stored(dataset)}
        if rows != set(self.valid):
            found.append(f"rows of {sorted(rows ^ set(self.valid))} are too few or too many")
        if dataset.rejects() != len(self.corrupt):
            found.append(f"{dataset.rejects()} in quarantine, but {len(self.corrupt)} corrupt inputs")
        fresh = run_units(recipe.model_copy(update={"dataset": str(self.nightly.folder / "fresh")}))
        if dataset_hash(fresh) != dataset_hash(dataset):
            found.append("the dataset differs from one that was made at once")
        return found

    def _training_faults(self) -> list[str]:
        found: list[str] = []
        run = self.nightly.folder / "run"
        stages = read_stages(run)
        if [(s.from_step, s.to_step) for s in stages] != [(i * STEPS, (i + 1) * STEPS) for i in range(len(stages))]:
            found.append(f"stages do not follow one another: {stages}")
        if (versions := [s.version for s in stages]) != sorted(set(versions)):
            found.append(f"versions do not ascend: {versions}")
        steps = [r["step"] for r in read_metrics(run / "metrics.jsonl", "train")]
        if steps != list(range(1, len(stages) * STEPS + 1)):
            found.append(f"steps were counted twice or left out: {steps}")
        recipe = pretrain_recipe(self.nightly.recipe, tokenize_recipe(self.nightly.recipe).dataset)
        assert recipe
        again = recipe.model_copy(update={"output": str(self.nightly.folder / "undisturbed")})
        for stage in stages:
            claimed = claim_stage(Path(again.output), STEPS, stage.version, "campaign")
            pretrain(stage_recipe(again, claimed), Console(quiet=True))
        weights = [Path(place) / "model/model.safetensors" for place in (run, again.output)]
        if weights[0].read_bytes() != weights[1].read_bytes():
            found.append("the weights differ from those of undisturbed stages on the same versions")
        exported = sorted(p.name for p in (self.nightly.folder / "models").glob("stage-*"))
        if not exported or exported[-1] != f"stage-{len(stages):04d}":
            found.append(f"the last stage is {len(stages)}, but {exported} are exported")
        return found

    def _history_faults(self) -> list[str]:
        found: list[str] = []
        state = self.nightly.state
        numbers = state.numbers()
        records = [state.record(n) for n in numbers]
        if numbers != list(range(1, len(numbers) + 1)) or None in records:
            return [f"runs without a record, or gaps: {numbers}"]
        known = [r for r in records if r]
        dataset = Dataset.open(tokenize_recipe(self.nightly.recipe).dataset)
        at = 0
        for record in known:
            if (plan := state.plan(record.number)).version != at:
                found.append(f"run {record.number} began at version {plan.version}, but the one before ended at {at}")
            at = record.version
        if at != dataset.version:
            found.append(f"the last record says version {at}, the dataset is at {dataset.version}")
        run = self.nightly.folder / "run"
        if sum(r.steps_trained for r in known) != len(read_stages(run)) * STEPS:
            found.append("the steps in the records are not those of the run")
        for before, after in pairwise(known):
            if datetime.fromisoformat(after.begun) < datetime.fromisoformat(before.begun):
                found.append(f"run {after.number} began before run {before.number}")
        lost = [r.number for r in known if r.outcome == "lost"]
        if len(lost) > self.kills:
            found.append(f"runs {lost} are said to be lost, but only {self.kills} kills landed")
        return found

    def outcomes(self) -> Counter[str]:
        return Counter(r.outcome for r in self.nightly.state.records())


def run(days: int, seed: int, folder: Path) -> tuple[Fortnight, list[str]]:
    """Live through so many days; the faults that were found."""
    fortnight = Fortnight(folder, seed)
    rng = random.Random(seed + 1)
    # Each kind comes as often as any other, in a drawn order.
    kinds = [kind for _ in range(days) for kind in rng.sample(KINDS, len(KINDS))]
    failing = {days // 2, days // 2 + 1}
    for number in range(1, days + 1):
        paused = number == days - 1
        today = ["one"] if paused or number in failing else [kinds.pop() for _ in range(rng.choice((1, 2, 2, 3)))]
        fortnight.day(number, today, failing=number in failing, paused=paused)
    fortnight.finish()
    return fortnight, fortnight.faults()


def _row(record: Record) -> str:
    return (
        f"| {record.number} | {record.outcome} | {record.documents} | {record.steps_trained} | {record.seconds:.0f} | "
        f"{record.why[:90]} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--folder", type=Path, help="keep everything there")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        fortnight, faults = run(arguments.days, arguments.seed, folder)
        records = sorted(fortnight.nightly.state.records(), key=lambda r: r.number)
        outcomes = ", ".join(f"{count} {kind}" for kind, count in sorted(fortnight.outcomes().items()))
        stages = len(read_stages(folder / "run"))
        text = (
            "# A fortnight of a recurring pipeline\n\n"
            f"{date.today()}, `python -m tests.campaigns.recurring_fortnight --days {arguments.days} --seed "
            f"{arguments.seed}`, {(time.monotonic() - began) / 60:.0f} min on {os.cpu_count()} cores. "
            f"{len(fortnight.valid)} inputs in the dataset, {len(fortnight.corrupt)} in quarantine, {stages} stages of "
            f"{STEPS} steps; {fortnight.kills} kills and sleeps landed; runs: {outcomes}. Faults: {len(faults)}.\n\n"
            "| day | inputs | ticks | what they said |\n|---|---|---|---|\n"
            + "".join(f"| {d.number} | {d.inputs} | {d.ticks} | {d.said.replace('|', '/')} |\n" for d in fortnight.days)
            + "\n| run | outcome | new documents | steps trained | s | why |\n|---|---|---|---|---|---|\n"
            + "".join(_row(r).replace(str(folder), "") + "\n" for r in records)
        )
    if arguments.log:
        arguments.log.parent.mkdir(parents=True, exist_ok=True)
        arguments.log.write_text(text.replace(str(folder), ""), encoding="utf-8")
    print(text)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
