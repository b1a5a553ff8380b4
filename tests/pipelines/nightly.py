"""A pipeline small enough for tests: texts in a folder, a model of a few thousand parameters, everything real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines.recipe import read_recipe
from pipelines.recurring.recipe import PipelineRecipe
from pipelines.recurring.state import Outcome, Record, Result, State
from tests.pipelines.jobs import text_recipe
from tests.pipelines.training import TINY

ROOT = Path(__file__).parents[2]
STEPS = 4


class Nightly:
    """A pipeline below a folder: `texts/` in, `tokens/`, `run/` and `models/` out, `state/` beside."""

    def __init__(self, folder: Path, texts: dict[str, str] | None = None, **changes: Any) -> None:
        """Args:
        changes: sections of the pipeline's recipe; None leaves one out.
        """
        self.folder = folder
        text_recipe(folder, **(texts or {}))
        tokenize = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"validation_share": 0.3, "workers": 1}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tokenize))
        pretrain = TINY | {
            "output": "set by the pipeline",
            "data": {"dataset": "set by the pipeline", "sequence_length": 64},
            "model": {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "ffn_hidden_size": 32},
            "optimizer": {},
            "schedule": {"kind": "wsd", "warmup_steps": 1, "decay_steps": 1},
            "batch": {"sequences": 2, "micro_batch": 2},
            "steps": 1000,
            "checkpoints": {"every": 2},
            "logging": {"every": 1, "tensorboard": False},
        }
        (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
        recipe: dict[str, Any] = {
            "state": str(folder / "state"),
            "tokenize": {"recipe": str(folder / "recipe.yaml")},
            "pretrain": {"recipe": str(folder / "pretrain.yaml"), "output": str(folder / "run"), "steps": STEPS},
            "evaluate": {},
            "export": {"to": str(folder / "models")},
            "retries": {"attempts": 1, "wait_s": 0.0},
            "lease": {"ttl_s": 3.0},
        }
        recipe = {k: v for k, v in (recipe | changes).items() if v is not None}
        self.file = folder / "nightly.yaml"
        self.file.write_text(yaml.safe_dump(recipe))

    @property
    def recipe(self) -> PipelineRecipe:
        return read_recipe(PipelineRecipe, self.file)

    @property
    def state(self) -> State:
        return State(self.folder / "state")

    def write(self, name: str, text: str | bytes) -> None:
        path = self.folder / "texts" / f"{name}.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """`braid pipeline WORD NAME ...` as a process of its own."""
        verb, *rest = words
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "pipeline", verb, str(self.file), *rest],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of `start`."""
        process = self.start(*words, **environment)
        said, _ = process.communicate(timeout=240)
        return process.returncode, said


def recorded(number: int, outcome: Outcome, why: str = "", **did: Any) -> Record:
    """What is kept of a run."""
    begun = f"2026-11-{1 + number % 28:02}T02:30:00+00:00"
    steps = [
        Result(step="tokenize", attempt=1, outcome="done", why="", begun=begun, seconds=20.0, host="n1",
               did={"by_modality": {"text": 900, "image": 100, "audio": 0}}),
        Result(step="pretrain", attempt=1, outcome="done", why="", begun=begun, seconds=50.0, host="n1", did=did),
    ]  # fmt: skip
    return Record(
        number=number,
        pipeline="nightly",
        trigger="tick",
        outcome=outcome,
        why=why,
        steps=steps,
        planned=["tokenize", "pretrain"],
        due={},
        version=number,
        documents=10,
        tokens=1100,
        trained_to=100 * number,
        steps_trained=100,
        executor="local",
        host="n1",
        begun=begun,
        ended=begun,
        seconds=75.0,
        memory={"failed": {"export": 2}},
        alerts=[{"to": "x.example", "event": "failed", "error": ""}] if outcome == "failed" else [],
    )


def recorded_nightly(folder: Path) -> Nightly:
    """A pipeline with three recorded runs, of which one failed with words that look like markup."""
    made = Nightly(folder)
    stage = {"stage": 1, "to_step": 100, "loss": {"text": 5.5, "text/0": 1.0}, "baseline": {"text": 6.0}}
    runs = [
        recorded(1, "done", **stage),
        recorded(2, "failed", "export: <script>alert(1)</script> & [bold]no disk[/bold]"),
        recorded(3, "done", **stage | {"stage": 2, "to_step": 300, "loss": {"text": 5.25}}),
    ]
    for record in runs:
        run = made.state.run_folder(record.number)
        run.mkdir(parents=True)
        (run / "plan.json").write_text("{}")
        assert made.state.conclude(record)
    return made
