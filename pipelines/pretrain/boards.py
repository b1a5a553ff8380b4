"""Where curves are drawn while a run goes on: TensorBoard, and Weights & Biases if the recipe says so.

Enters: the numbers of a record. Leaves: `RUN/tensorboard/`, `RUN/wandb/` and, online, what W&B is sent. Always holds: they
are copies of `RUN/metrics.jsonl`; a run that goes on, or goes back, draws on in the same place.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines.pretrain.recipe import LoggingSettings
from pipelines.pretrain.run import RunError


class Board(Protocol):
    """Draws curves."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Points of one step."""

    def go_back(self, step: int) -> None:
        """The steps after this one are taken anew."""

    def close(self) -> None:
        """Write what is not written yet."""


def require_boards(settings: LoggingSettings) -> None:
    """Refuse a setting that cannot be followed; every rank asks, before any work.

    Raises:
        RunError: W&B is asked for and not installed.
    """
    if settings.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise RunError(
            f"logging.wandb is {settings.wandb!r}, but the package wandb is not installed; pip install 'wandb>=0.22', or "
            "set logging.wandb to 'off'"
        )


def open_boards(folder: Path, settings: LoggingSettings, start: int, recipe: Mapping[str, Any]) -> list[Board]:
    """Those that the recipe asks for.

    Args:
        folder: of the run.
        start: steps taken before.
        recipe: resolved, to be shown beside the curves.

    Raises:
        RunError: W&B refuses.
    """
    boards: list[Board] = []
    if settings.tensorboard:
        boards.append(TensorBoard(folder / "tensorboard", start))
    if settings.wandb != "off":
        boards.append(WeightsAndBiases(folder, settings.wandb, recipe))
    return boards


class TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._open(start)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=start + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run there for a run folder, however often it was started; its project is WANDB_PROJECT, or `braid`."""

    def __init__(self, folder: Path, mode: str, recipe: Mapping[str, Any]) -> None:
        """
        Args:
            mode: "online" or "offline", which `wandb sync` sends later.
        """
        import wandb

        file = folder / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(uuid.uuid4().hex[:16])
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "braid"),
                name=folder.name,
                id=file.read_text(),
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                resume="allow",
                config=dict(recipe),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise RunError(
                f"logging.wandb is {mode!r}, but W&B cannot be used: {error}. Log in with `wandb login`, or set "
                "logging.wandb to 'offline' and send the run later with `wandb sync`"
            ) from error
        # An axis of our own: W&B drops what comes for a step that it has seen, and those of a run that goes on come again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def go_back(self, step: int) -> None:
        """The points that are there stay, the new ones come over them."""

    def close(self) -> None:
        self._run.finish()
