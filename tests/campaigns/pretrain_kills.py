"""Kill pretraining runs again and again, and compare what they end with with an undisturbed run.

    python -m tests.campaigns.pretrain_kills --kills 40 --seed 1 --log docs/campaigns/pretrain_kills.md

Every trial trains a tiny model in fp32 on the CPU, with one rank or two under torchrun, from a mixture of two datasets,
packed, and kills it: one rank or all of them by SIGKILL at a random moment, one at a named place while it saves
(`pipelines.crash`), one by SIGSTOP, which the other's watchdog notices, or by SIGUSR2, after which all save. The same command
is given again until the run ends well. Then weights and metrics must be, bit by bit, those of the undisturbed run with as
many ranks. Some trials change the number of ranks between starts; their losses must be within 1e-5.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pipelines.crash import SAVE_POINTS
from pipelines.pretrain.metrics import read_metrics
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.recipe import dump_recipe
from tests.pipelines.corpora import make_dataset

STEPS = 40
MOST_STARTS = 12
ROOT = Path(__file__).parents[2]


@dataclass(kw_only=True)
class Kill:
    """One kill: of one rank or all, at a named place or when some steps are done."""

    kind: str
    """`one rank`, `all ranks`, `stopped rank`, `told to stop`, or a name of `SAVE_POINTS`."""
    step: int = 0
    """Steps of this start that are done when it strikes."""
    count: int = 1
    """Which pass of a named place."""
    landed: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, pass {self.count}" if self.kind in SAVE_POINTS else f"{self.kind} at step {self.step}"


class Campaign:
    """Two datasets, what undisturbed runs end with, and trials against them."""

    def __init__(self, folder: Path, seed: int, worlds: tuple[int, ...] = (1, 2)) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        for name, units in (("a", 3), ("b", 2)):
            make_dataset(folder / name, units=units, rows=30, seed=units)
        self.expected = {}
        for world in worlds:
            process = self._start(f"undisturbed-{world}", world)
            assert process.wait() == 0, (folder / f"undisturbed-{world}.log").read_text()[-3000:]
            self.expected[world] = self._end(f"undisturbed-{world}")
        self.worlds = worlds

    def recipe(self, name: str) -> PretrainRecipe:
        return PretrainRecipe.model_validate(
            {
                "output": str(self.folder / name),
                "data": {
                    "mixture": [
                        {"dataset": str(self.folder / "a"), "weight": 2},
                        {"dataset": str(self.folder / "b"), "weight": 1},
                    ],
                    "sequence_length": 96,
                    "window_tokens": 3000,
                },
                "model": {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64},
                "batch": {"sequences": 8, "micro_batch": 2},
                "steps": STEPS,
                "precision": "fp32",
                "checkpoints": {"every": 3, "keep": 2},
                "validation": {"every": 20},
                "logging": {"every": 1, "tensorboard": False},
                "faults": {"hang_s": 12},
                "device": "cpu",
                "threads": 1,
            }
        )

    def kills(self) -> Iterator[Kill]:
        """An endless plan in which every kind comes up."""
        while True:
            kinds = ["one rank", "all ranks", *SAVE_POINTS, "one rank", "stopped rank", "told to stop"]
            for kind in self.random.sample(kinds, len(kinds)):
                yield Kill(kind=kind, step=self.random.randint(0, STEPS // 3), count=self.random.randint(1, 3))

    def trial(self, name: str, kills: list[Kill], worlds: list[int]) -> str:
        """Run with kills until it ends well; what is wrong, or ""."""
        for start in range(MOST_STARTS):
            kill = kills[start] if start < len(kills) else None
            if self._run_with(name, kill, worlds[min(start, len(worlds) - 1)]) == 0:
                return self._fault(name, worlds)
        return f"the run did not end well in {MOST_STARTS} starts"

    def _run_with(self, name: str, kill: Kill | None, world: int) -> int:
        marker = uuid.uuid4().hex
        environment: dict[str, str] = {}
        once = self.folder / f"once-{marker}"
        if kill and kill.kind in SAVE_POINTS:
            once.touch()
            environment["BRAID_CRASH"] = f"{kill.kind}:{kill.count}:{once}"
        process = self._start(name, world, marker=marker, **environment)
        if kill and kill.kind not in SAVE_POINTS:
            self._strike(name, process, kill, marker)
        code = process.wait(timeout=240)
        if kill and kill.kind in SAVE_POINTS:
            kill.landed = not once.exists()
            once.unlink(missing_ok=True)
        for pid in _ranks(marker):
            # What a launcher that was killed has left.
            _signal(pid, signal.SIGKILL)
        return code

    def _strike(self, name: str, process: subprocess.Popen[bytes], kill: Kill, marker: str) -> None:
        metrics = self.folder / name / "metrics.jsonl"
        before = self._steps(metrics)
        while process.poll() is None and self._steps(metrics) - before < kill.step:
            time.sleep(0.01)
        if kill.step == 0:
            time.sleep(self.random.uniform(0, 6))
        ranks = _ranks(marker)
        if not ranks or process.poll() is not None:
            return
        chosen = ranks if kill.kind == "all ranks" else [self.random.choice(ranks)]
        number = {"stopped rank": signal.SIGSTOP, "told to stop": signal.SIGUSR2}.get(kill.kind, signal.SIGKILL)
        # All of them, whichever are still there.
        kill.landed = True in {pid: _signal(pid, number) for pid in chosen}.values()
        if number == signal.SIGSTOP and len(ranks) == 1:
            # Alone, nobody notices: an operator kills it.
            time.sleep(1)
            _signal(chosen[0], signal.SIGKILL)

    @staticmethod
    def _steps(metrics: Path) -> int:
        return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0

    def _start(self, name: str, world: int, *, marker: str = "", **environment: str) -> subprocess.Popen[bytes]:
        file = self.folder / f"{name}.yaml"
        file.write_text(dump_recipe(self.recipe(name)))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        script = self.folder / "train.py"
        script.write_text("import sys; from pipelines.pretrain import main; main(sys.argv[1])")
        log = (self.folder / f"{name}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, *torchrun, str(script), str(file)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "BRAID_TRIAL": marker, **environment},
        )

    def _end(self, name: str) -> tuple[str, list[Any]]:
        """(sha256 of the weights, what every step and validation came to)."""
        folder = self.folder / name
        steps = read_metrics(folder / "metrics.jsonl", "train")
        validations = [r["loss"] for r in read_metrics(folder / "metrics.jsonl", "validation")]
        said = [[r["step"], r["loss"], r["gradient_norm"], r["learning_rate"]] for r in steps]
        return hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest(), [*said, validations]

    def _fault(self, name: str, worlds: list[int]) -> str:
        weights, metrics = self._end(name)
        expected_weights, expected_metrics = self.expected[worlds[0]]
        if len(set(worlds)) == 1:
            if metrics != expected_metrics:
                return "other metrics than the undisturbed run"
            return "" if weights == expected_weights else "other weights than the undisturbed run"
        for (step, losses, *_), (_, expected, *_) in zip(metrics[:-1], expected_metrics[:-1], strict=True):
            for modality, value in losses.items():
                if abs(value - expected[modality]) > 1e-5 * abs(value):
                    return f"step {step}: {modality} {value}, undisturbed {expected[modality]}"
        return ""


def _ranks(marker: str) -> list[int]:
    """The training processes of one start, without their launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = f"BRAID_TRIAL={marker}".encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                # It has just ended.
                continue
            if ours and b"torch.distributed.run" not in command and any(a.endswith(b"train.py") for a in command):
                found.append(int(entry.name))
    return found


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def run(
    kills: int,
    seed: int,
    report: list[str],
    worlds: tuple[int, ...] = (1, 2),
    told: Callable[[], None] = lambda: None,
) -> list[str]:
    """Bring so many kills to land; the faults that were found.

    Args:
        told: called after each trial.
    """
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed, worlds)
        plan = campaign.kills()
        landed = trial = 0
        while landed < kills:
            trial += 1
            chosen = [next(plan) for _ in range(campaign.random.randint(2, 5))]
            same = len(worlds) == 1 or trial % 4
            of = [campaign.random.choice(worlds)] if same else campaign.random.choices(worlds, k=len(chosen) + 1)
            fault = campaign.trial(f"t{trial}", chosen, of)
            chosen = [kill for kill in chosen if kill.landed]
            landed += len(chosen)
            ranks = " then ".join(map(str, of))
            outcome = fault or ("equal" if len(set(of)) == 1 else "within 1e-5")
            report.append(f"| {trial} | {ranks} | {'; '.join(map(str, chosen)) or 'none landed'} | {outcome} |")
            print(f"{landed}/{kills} {report[-1]}", flush=True)
            told()
            if fault:
                faults.append(f"trial {trial}: {fault}")
                print((Path(folder) / f"t{trial}.log").read_text(errors="replace")[-3000:], flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path)
    arguments = parser.parse_args()
    report: list[str] = []
    began = time.monotonic()

    def tell() -> None:
        # After each trial, so that what was found is there if the campaign itself is stopped.
        if arguments.log:
            arguments.log.parent.mkdir(exist_ok=True)
            arguments.log.write_text(_log(arguments.kills, arguments.seed, report, time.monotonic() - began), "utf-8")

    faults = run(arguments.kills, arguments.seed, report, told=tell)
    print(_log(arguments.kills, arguments.seed, report, time.monotonic() - began).split("\n\n")[1])
    if faults:
        sys.exit("\n".join(faults))


def _log(kills: int, seed: int, report: list[str], seconds: float) -> str:
    kinds = Counter(
        kill.partition(" at ")[0].partition(",")[0]
        for line in report
        for kill in line.split("|")[3].strip().split("; ")
        if kill != "none landed"
    )
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    good = sum(line.endswith(("| equal |", "| within 1e-5 |")) for line in report)
    return (
        "# Kills of pretraining\n\n"
        f"{date.today()}, `python -m tests.campaigns.pretrain_kills --kills {kills} --seed {seed}`, {seconds / 60:.0f} min "
        f"on {os.cpu_count()} cores. {sum(kinds.values())} kills landed: {counted}. Faults: {len(report) - good}.\n\n"
        "| trial | ranks | kills | weights and metrics against the undisturbed run's |\n|---|---|---|---|\n"
        + "\n".join(report)
        + "\n"
    )


if __name__ == "__main__":
    main()
