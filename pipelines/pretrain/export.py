"""The trained model as plain files, for generation and for others: nothing in them is ever unpickled.

model.safetensors   all weights, tied ones once
config.json         `UnifiedTransformerConfig`
vocabulary.json     `Vocabulary`
braid.json          format, step, fingerprint, the dataset, its tokenizers, sha256 of the files above
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.pretrain.checkpoint import CheckpointError, code_version, sha256_of, verify_checkpoint
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer
from pipelines.pretrain.recipe import PretrainRecipe, model_config
from pipelines.sequence import Vocabulary
from pipelines.shards.storage import sync

FORMAT_VERSION = 1
"""Raised when the layout of an exported model changes."""

_FILES = ("model.safetensors", "config.json", "vocabulary.json")

SHIPPED = Path(__file__).parent.parent / "generate/shipped"
"""Models that come with Braid, a folder each."""


def export_model(
    folder: Path, model: ShardedTransformer, vocabulary: Vocabulary, about: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write a model to a folder, down to the disk; every rank must call it. `braid.json` comes last and makes it valid.

    Args:
        about: what else `load_model` shall give back, as JSON values.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))
    if ranks.first:
        _write(folder, weights, model.config, vocabulary, about)


def export_checkpoint(
    checkpoint: Path, folder: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write the model of a checkpoint to a folder, in one process and without a device.

    Args:
        checkpoint: its folder; its files are compared with their sha256 first.
        about: what `load_model` shall give back; by default what the checkpoint itself tells.
        dtype: what its weights are rounded to; None is what the checkpoint has.

    Raises:
        CheckpointError: it is damaged.
    """
    record = verify_checkpoint(checkpoint)
    recipe = PretrainRecipe.model_validate_json(json.dumps(record.recipe), strict=True)
    vocabulary = Vocabulary.from_dict(record.vocabulary)
    config = model_config(recipe, vocabulary)
    model = UnifiedTransformer(replace(config, device="cpu"))
    weights = model.state_dict()
    dcp.load({"model": weights}, checkpoint_id=checkpoint / "state", no_dist=True)
    told = {
        "step": record.step,
        "tokens": record.step * recipe.tokens_per_step,
        "datasets": [{"dataset": part.dataset, "version": part.version} for part in recipe.data.parts],
        "tokenizers": record.tokenizers,
        "recipe": dict(record.recipe),
    }
    rounded = {name: weight.to(dtype or weight.dtype) for name, weight in _once(weights).items()}
    _write(folder, rounded, config, vocabulary, told if about is None else about)


def _once(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights under their first name alone, because the model ties them again."""
    seen: dict[int, str] = {}
    return {name: tensor for name, tensor in weights.items() if seen.setdefault(tensor.data_ptr(), name) == name}


def _write(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: UnifiedTransformerConfig,
    vocabulary: Vocabulary,
    about: Mapping[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "braid.json").unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1))
    # safetensors makes files that nobody else may read; a model is as readable as what stands beside it.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict(), indent=1))
    record = {
        "format_version": FORMAT_VERSION,
        "fingerprint": vocabulary.fingerprint,
        "braid": code_version(),
        "files": {name: sha256_of(folder / name) for name in _FILES},
        **about,
    }
    (folder / "braid.json").write_text(json.dumps(record, indent=1))
    for path in (*(folder / name for name in _FILES), folder / "braid.json", folder, folder.parent):
        sync(path)


def shipped_models() -> list[str]:
    """Names of the models that come with Braid."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/braid.json"))


def load_model(
    folder: str | Path, device: str | torch.device = "cpu"
) -> tuple[UnifiedTransformer, Vocabulary, dict[str, Any]]:
    """Read a model that `export_model` wrote, ready for evaluation.

    Args:
        folder: the model's folder, the run folder that holds it as `model/`, or a shipped model's name where no such
            folder is.

    Returns:
        The model on the device in float32, whatever its file holds, its vocabulary, and `braid.json`.

    Raises:
        CheckpointError: no model there, or a file is missing, truncated, changed, or of another format.
    """
    path = Path(folder)
    if not path.exists() and str(folder) in shipped_models():
        path = SHIPPED / folder
    if not (path / "braid.json").is_file() and (path / "model").is_dir():
        path = path / "model"
    if not (path / "braid.json").is_file():
        raise CheckpointError(
            f"{path / 'braid.json'} is missing: no exported model here; name a finished run's folder, or its model/"
            + (f", or a shipped model ({', '.join(shipped_models())})" if shipped_models() else "")
        )
    try:
        about: dict[str, Any] = json.loads((path / "braid.json").read_bytes())
        written, files = about["format_version"], about["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'braid.json'} is damaged; copy the model again or export it again") from error
    if written != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / 'braid.json'}: written in format {written}, this Braid reads {FORMAT_VERSION}; update Braid"
        )
    for name in _FILES:
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; copy the model again or export it again")
        if sha256_of(path / name) != files.get(name):
            raise CheckpointError(
                f"{path / name} is truncated or changed: its sha256 is not the one in braid.json; copy the model again "
                "or export it again"
            )
    vocabulary = Vocabulary.from_dict(json.loads((path / "vocabulary.json").read_bytes()))
    config = UnifiedTransformerConfig.from_dict(json.loads((path / "config.json").read_bytes()))
    # What computed it in training need not be here.
    config = replace(config, attention_backend="auto", block_backend="auto")
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    weights = load_file(path / "model.safetensors", device=str(device))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval(), vocabulary, about
