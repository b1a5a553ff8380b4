"""Runs and checkpoints on disk, told in tables.

Enters: folders. Leaves: plain values for programs, and tables for people. Always holds: nothing is changed, no checkpoint's
data is read, and a damaged one is told as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from model import MODALITIES
from pipelines.pretrain.checkpoint import CheckpointError, describe_checkpoint, list_checkpoints, step_of
from pipelines.pretrain.metrics import ROLL_BACK, SAVE, read_metrics
from pipelines.pretrain.run import RunError, read_finished


def checkpoints_below(where: Path) -> list[Path]:
    """The checkpoints of a run, or the one that is named.

    Raises:
        CheckpointError: there is none.
    """
    if (where / "checkpoint.json").exists():
        return [where]
    found = list_checkpoints(where / "checkpoints") or list_checkpoints(where)
    if not found:
        raise CheckpointError(f"{where}: no checkpoint here; name the folder of a run, or one of its checkpoints")
    return found


def checkpoints_of(run: Path) -> list[dict[str, Any]]:
    """What is known of each checkpoint without reading its data."""
    found = []
    for path in checkpoints_below(run):
        told: dict[str, Any] = {
            "name": path.name,
            "step": step_of(path),
            "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            "saved": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        }
        try:
            told |= describe_checkpoint(path)
        except CheckpointError as error:
            told["damaged"] = str(error)
        found.append(told)
    return found


def checkpoints_table(run: Path, found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"Checkpoints of {escape(str(run))}")
    for column in ("step", "saved (UTC)", "MB", "ranks", "braid", ""):
        table.add_column(column, justify="right" if column in ("step", "MB", "ranks") else "left")
    for told in found:
        table.add_row(
            f"{told['step']:,}",
            told["saved"][:19].replace("T", " "),
            f"{told['bytes'] / 1e6:,.1f}",
            str(told.get("world_size", "")),
            told.get("braid", ""),
            escape(told.get("damaged", "")),
        )
    return table


def find_runs(folder: Path) -> list[Path]:
    """The run folders below a folder, by name."""
    return sorted(file.parent for file in folder.rglob("recipe.yaml") if (file.parent / "metrics.jsonl").exists())


def summary(run: Path) -> dict[str, Any]:
    """How far a run is, and what it has come to.

    Raises:
        RunError: there is no run, or its metrics are damaged.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        raise RunError(f"{run}: no run of Braid; name the folder that is `output` in the recipe of a run")
    steps, validations = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    last = steps[-1] if steps else None
    recent = steps[-50:]
    return {
        "run": str(run),
        "steps": last["step"] if last else 0,
        "finished": read_finished(run) is not None,
        "validation": validations[-1]["loss"] if validations else None,
        "training": last["loss"] if last else None,
        "tokens_per_s": _mean([r["tokens_per_s"] for r in recent]),
        "data_wait_share": _mean([r["data_wait_share"] for r in recent]),
        "padding_share": _mean([r["padding_share"] for r in recent]),
        "mfu": _mean([r["mfu"]["full"] for r in recent if "mfu" in r]),
        "save_pause_s": max((r["pause_s"] for r in read_metrics(metrics, SAVE)), default=None),
        "memory_gb": max(r["memory_gb"] for r in recent) if recent else None,
        "datasets": last.get("datasets") if last else None,
        "faults": sum("fault" in r for r in steps),
        "roll_backs": len(read_metrics(metrics, ROLL_BACK)),
    }


def datasets_table(losses: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Training losses of the last step by dataset."""
    table = Table(title="Training loss of the last step by dataset")
    for column in ("dataset", *MODALITIES):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for name, loss in losses.items():
        values = (loss[modality] for modality in MODALITIES)
        table.add_row(escape(name), *(f"{value:.3f}" if value is not None else "" for value in values))
    return table


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def runs_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Runs: validation loss where there is one, else that of the last step")
    for column in (
        "run",
        "steps",
        "",
        "text",
        "image",
        "audio",
        "tokens/s",
        "MFU",
        "data wait",
        "save pause",
        "padding",
        "GB",
        "faults",
    ):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    for told in found:
        loss = told["validation"] or told["training"] or {}
        table.add_row(
            escape(told["run"]),
            f"{told['steps']:,}",
            "finished" if told["finished"] else "",
            *(f"{loss[name]:.3f}" if loss.get(name) is not None else "" for name in ("text", "image", "audio")),
            f"{told['tokens_per_s']:,.0f}" if told["tokens_per_s"] else "",
            f"{told['mfu']:.1%}" if told["mfu"] is not None else "",
            f"{told['data_wait_share']:.1%}" if told["data_wait_share"] is not None else "",
            f"{told['save_pause_s']:.2f} s" if told["save_pause_s"] is not None else "",
            f"{told['padding_share']:.1%}" if told["padding_share"] is not None else "",
            f"{told['memory_gb']:,.1f}" if told["memory_gb"] is not None else "",
            ", ".join(
                f"{told[key]}{word}" for key, word in (("faults", ""), ("roll_backs", " x rolled back")) if told[key]
            ),
        )
    return table
