"""Checkpoints: whole or absent, and checked before a byte of them is believed.

    RUN/checkpoints/step-00000200/state/           weights and optimizer, in torch's distributed format (DCP)
    RUN/checkpoints/step-00000200/checkpoint.json  the rest: loader, recipe, vocabulary, versions, sha256 of every file
                                                   and of itself

Enters: model, optimizer, and what `Checkpoint` holds. Leaves: a folder that appears under its name by one rename, when all
of it is on the disk. Always holds: no file is opened by torch before its sha256 agrees. DCP reads its `.metadata` by
pickle, so a checkpoint is to be trusted as far as whoever wrote its folder; for others there is `pipelines.pretrain.export`.
Random state is not kept, because `pipelines.pretrain.step.seed_step` makes it from seed, step and rank.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pipelines.crash import crash_point
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.sequence import Vocabulary
from pipelines.shards.storage import DiskFullError, naming_a_full_disk, sync

FORMAT_VERSION = 2
"""Raised when the layout of a checkpoint changes. 2: the loader's place has stages and a position for each dataset."""

NAME = re.compile(r"step-(\d{8,})")
"""Of a checkpoint's folder; what is named otherwise is none."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the remedy."""


class DamagedCheckpointError(CheckpointError):
    """Bytes of a checkpoint are not those that were written. A run goes on from the one before it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds beside weights and optimizer."""

    step: int
    """Optimizer steps taken."""
    loader: Mapping[str, Any]
    """`Loader.state_dict`: where the next step begins."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    vocabulary: Mapping[str, Any]
    """`Vocabulary.to_dict`."""
    guard: Mapping[str, Any]
    """`Guard.state_dict`: what losses were usual."""
    tokenizers: Mapping[str, Any] | None = None
    """Those of the dataset's recipe, which a model exported from here is used with; None where they are not known."""


def state_of(model: ShardedTransformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and moments as DCP takes them, sharing the memory of the model and the optimizer."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, state: dict[str, Any], ranks: Ranks, group: dist.ProcessGroup | None = None
) -> Path:
    """Write a checkpoint of this state; every rank must call it, and on all of them it succeeds or fails.

    Args:
        group: what the ranks talk through; None is the default group.

    Raises:
        DiskFullError, SaveError: it could not be written, on whichever rank; nothing is left of it.
    """
    final = path_of(folder, checkpoint.step)
    partial = folder / f".{final.name}.partial"

    def together(work: Callable[[], Any]) -> Any:
        return _together(work, folder, ranks, group)

    try:
        together(lambda: _make_room(partial) if ranks.first else None)
        together(lambda: dcp.save(state, checkpoint_id=partial / "state", process_group=group))
        names = sorted(str(p.relative_to(partial)) for p in (partial / "state").iterdir())
        mine = names[ranks.rank :: ranks.world_size]
        sums = {k: v for part in together(lambda: _sums(partial, mine)) for k, v in part.items()}
        together(lambda: _finish(partial, final, checkpoint, sums, ranks) if ranks.first else None)
    except Exception:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


def _together(work: Callable[[], Any], folder: Path, ranks: Ranks, group: dist.ProcessGroup | None) -> list[Any]:
    """Do something on every rank; what it gave on each, or an error on all of them if it failed on any."""
    result, fault, full = None, None, False
    try:
        with naming_a_full_disk(folder):
            result = work()
    except (Exception, CheckpointException) as error:
        # DCP wraps what went wrong on any rank into an error of its own, which is no Exception.
        fault = f"{type(error).__name__}: {error}"
        full = isinstance(error, DiskFullError) or "No space left on device" in fault or "Disk quota" in fault
    outcomes: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(outcomes, (result, fault, full), group=group)
    if any(full for _, _, full in outcomes):
        raise DiskFullError(
            f"{folder}: the disk is full, so this checkpoint could not be saved; those before it are whole. Free space "
            "there, or lower checkpoints.keep"
        )
    if fault := next((fault for _, fault, _ in outcomes if fault), None):
        raise SaveError(f"{folder}: this checkpoint could not be saved; those before it are whole ({fault})")
    return [result for result, _, _ in outcomes]


def _make_room(partial: Path) -> None:
    # What stands there is the rest of a run that died while saving.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _sums(partial: Path, names: list[str]) -> dict[str, str]:
    for name in names:
        sync(partial / name)
    crash_point("while_saving")
    return {name: sha256_of(partial / name) for name in names}


def _finish(partial: Path, final: Path, checkpoint: Checkpoint, sums: dict[str, str], ranks: Ranks) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        **asdict(checkpoint),
        "fingerprint": Vocabulary.from_dict(checkpoint.vocabulary).fingerprint,
        "world_size": ranks.world_size,
        "code": {"braid": code_version(), "torch": torch.__version__},
        "files": dict(sorted(sums.items())),
    }
    record["sha256"] = _sha256_of_record(record)
    (partial / "checkpoint.json").write_text(json.dumps(record, indent=1))
    for path in (partial / "checkpoint.json", partial / "state", partial):
        sync(path)
    crash_point("before_rename")
    partial.rename(final)
    sync(final.parent)


def prune_checkpoints(folder: Path, keep: int, keep_every: int | None = None, protected: Collection[int] = ()) -> None:
    """Delete all but the newest checkpoints, and what runs that died while saving or deleting have left.

    Args:
        keep_every: keep those of steps that this divides, too.
        protected: keep those of these steps, too.
    """
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest)
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) not in protected and not (keep_every and step_of(path) % keep_every == 0):
            _delete(path)


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _delete(path)


def _delete(path: Path) -> None:
    # Renamed first, so that no half-deleted checkpoint is ever found.
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleted")))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or will lie."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(path.name.removeprefix("step-"))


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What its record says of a checkpoint, in plain words.

    Raises:
        CheckpointError: see `read_checkpoint`.
    """
    record = _record(path)
    return {
        "step": record["step"],
        "world_size": record["world_size"],
        "fingerprint": record["fingerprint"],
        **record["code"],
    }


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which no run goes on from it, for people to look at."""
    number = 1
    while (target := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    return path.rename(target)


def verify_checkpoint(path: Path) -> Checkpoint:
    """Read every byte of a checkpoint and compare it with its sha256.

    Raises:
        CheckpointError: see `read_checkpoint`; or a file is missing or damaged.
    """
    checkpoint = read_checkpoint(path)
    if fault := _first_fault(path, sorted(_record(path)["files"]), _record(path)["files"]):
        raise DamagedCheckpointError(f"{fault}; {_remedy(path)}")
    return checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """What stands in `checkpoint.json`, without weights.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or of another step than the folder's name.
    """
    record = _record(path)
    return Checkpoint(**{name: record[name] for name in Checkpoint.__dataclass_fields__ if name in record})


def load_checkpoint(
    path: Path, model: ShardedTransformer, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Checkpoint:
    """Verify a checkpoint and put weights and optimizer back, for any number of ranks; every rank must call it.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, on whichever rank it was noticed.
    """
    checkpoint = read_checkpoint(path)
    faults: list[str | None] = [None] * ranks.world_size
    files = _record(path)["files"]
    dist.all_gather_object(faults, _first_fault(path, sorted(files)[ranks.rank :: ranks.world_size], files))
    if fault := next((f for f in faults if f), None):
        raise DamagedCheckpointError(f"{fault}; {_remedy(path)}")
    weights, moments = get_state_dict(model, optimizer)
    # It fills the tensors in place; numbers such as the step count of the optimizer are replaced in the dictionaries.
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path / "state")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return checkpoint


def sha256_of(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version() -> str:
    """The installed version of Braid."""
    try:
        return version("braid-lm")
    except PackageNotFoundError:
        return "not installed"


def _first_fault(path: Path, names: Sequence[str], files: Mapping[str, str]) -> str | None:
    for name in names:
        if not (path / name).is_file():
            return f"{path / name} is missing"
        if sha256_of(path / name) != files[name]:
            return f"{path / name} is damaged or truncated: its sha256 is not the one in checkpoint.json"
    return None


def _record(path: Path) -> dict[str, Any]:
    file = path / "checkpoint.json"
    try:
        record = json.loads(file.read_bytes())
        written = record["format_version"]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{file} is missing, so {path} is no Braid checkpoint; {_remedy(path)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{file} is damaged or not Braid's; {_remedy(path)}") from error
    if written != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: written in format {written}, this Braid reads {FORMAT_VERSION}; use the version "
            "of Braid that wrote it, or a newer one"
        )
    always = {field.name for field in fields(Checkpoint) if field.default is MISSING}
    missing = sorted({*always, "files", "sha256"} - record.keys())
    if missing:
        raise DamagedCheckpointError(f"{file} is damaged: it has no {missing[0]}; {_remedy(path)}")
    if record["sha256"] != _sha256_of_record(record):
        raise DamagedCheckpointError(f"{file} is damaged: its sha256 is not the one that it names; {_remedy(path)}")
    if path.name != path_of(path.parent, record["step"]).name:
        raise DamagedCheckpointError(
            f"{file} is of step {record['step']}, unlike the name of its folder; {_remedy(path)}"
        )
    return dict(record)


def _sha256_of_record(record: Mapping[str, Any]) -> str:
    """Of all keys but `sha256`, as JSON with sorted keys and no spaces."""
    # Through JSON and back, because keys that are no strings sort differently before.
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remedy(path: Path) -> str:
    # A run goes on from its newest checkpoint, so every other one is older.
    others = [p for p in list_checkpoints(path.parent) if p != path]
    then = "goes on from the checkpoint before it" if others else "starts over, for there is no other checkpoint"
    return f"delete the folder {path}, and the run {then}"
