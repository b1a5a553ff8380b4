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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.sequence import Vocabulary
from pipelines.shards.storage import sync

FORMAT_VERSION = 1
"""Raised when the layout of a checkpoint changes."""

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file and the remedy."""


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


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, model: ShardedTransformer, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Path:
    """Write a checkpoint; every rank must call it. Returns its folder."""
    final = folder / _name(checkpoint.step)
    partial = folder / f".{final.name}.partial"
    if ranks.first:
        # What stands there is the rest of a run that died while saving.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial / "state")
    sums = _gather_sums(partial, ranks)
    if ranks.first:
        vocabulary = Vocabulary.from_dict(checkpoint.vocabulary)
        record = {
            "format_version": FORMAT_VERSION,
            **asdict(checkpoint),
            "fingerprint": vocabulary.fingerprint,
            "world_size": ranks.world_size,
            "code": {"braid": code_version(), "torch": torch.__version__},
            "files": sums,
        }
        record["sha256"] = _sha256_of_record(record)
        (partial / "checkpoint.json").write_text(json.dumps(record, indent=1))
        for path in (*(partial / name for name in sums), partial / "checkpoint.json", partial / "state", partial):
            sync(path)
        partial.rename(final)
        sync(folder)
    dist.barrier()
    return final


def prune_checkpoints(folder: Path, keep: int, ranks: Ranks) -> None:
    """Delete all but the newest checkpoints, and what runs that died while saving or deleting have left."""
    if not ranks.first:
        return
    for rest in folder.glob(".step-*"):
        shutil.rmtree(rest)
    for path in list_checkpoints(folder)[:-keep]:
        # Renamed first, so that no half-deleted checkpoint is ever found.
        doomed = path.rename(path.with_name(f".{path.name}.deleted"))
        shutil.rmtree(doomed)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> Checkpoint:
    """What stands in `checkpoint.json`, without weights.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or of another step than the folder's name.
    """
    record = _record(path)
    return Checkpoint(**{name: record[name] for name in Checkpoint.__dataclass_fields__})


def load_checkpoint(
    path: Path, model: ShardedTransformer, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> Checkpoint:
    """Verify a checkpoint and put weights and optimizer back, for any number of ranks; every rank must call it.

    Raises:
        CheckpointError: a file is missing, damaged or foreign, on whichever rank it was noticed.
    """
    checkpoint = read_checkpoint(path)
    faults: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(faults, _first_fault(path, _record(path)["files"], ranks))
    if fault := next((f for f in faults if f), None):
        raise CheckpointError(f"{fault}; {_remedy(path)}")
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


def _gather_sums(partial: Path, ranks: Ranks) -> dict[str, str]:
    """sha256 by name of all files; each rank reads the files that it wrote."""
    dist.barrier()
    names = sorted(str(p.relative_to(partial)) for p in (partial / "state").iterdir())
    mine = {name: sha256_of(partial / name) for name in names[ranks.rank :: ranks.world_size]}
    parts: list[dict[str, str]] = [{}] * ranks.world_size
    dist.all_gather_object(parts, mine)
    return {name: part[name] for part in parts for name in part}


def _first_fault(path: Path, files: Mapping[str, str], ranks: Ranks) -> str | None:
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
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
        raise CheckpointError(f"{file} is missing, so {path} is no Braid checkpoint; {_remedy(path)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged or not Braid's; {_remedy(path)}") from error
    if written != FORMAT_VERSION:
        raise CheckpointError(f"{file}: written in format {written}, this Braid reads {FORMAT_VERSION}; update Braid")
    missing = sorted({*Checkpoint.__dataclass_fields__, "files", "sha256"} - record.keys())
    if missing:
        raise CheckpointError(f"{file} is damaged: it has no {missing[0]}; {_remedy(path)}")
    if record["sha256"] != _sha256_of_record(record):
        raise CheckpointError(f"{file} is damaged: its sha256 is not the one that it names; {_remedy(path)}")
    if path.name != _name(record["step"]):
        raise CheckpointError(f"{file} is of step {record['step']}, unlike the name of its folder; {_remedy(path)}")
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


def _name(step: int) -> str:
    return f"step-{step:08d}"
