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
from pipelines.recurring.state import State
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
