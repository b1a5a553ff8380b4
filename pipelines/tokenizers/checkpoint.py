"""A tokenizer on disk: one folder, the same for pictures and for sound.

    config.json          "kind" ("image" or "audio"), the architecture, what encoding needs to know
    weights.safetensors  tensors only: loading it runs no code
    card.md, card.json   data, licence, command, hardware, and figures on held-out items

The card may be rewritten; the identity of a tokenizer is `checkpoint_sha256`, over config and weights alone, and
it enters the fingerprint of every dataset and model made with the tokenizer.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SHIPPED = Path(__file__).parent / "shipped"
CONFIG, WEIGHTS = "config.json", "weights.safetensors"


class CheckpointError(ValueError):
    """A tokenizer folder is missing, incomplete, or of another kind; the message says which and what to do."""


def shipped_names() -> list[str]:
    """Names of the tokenizers that come with Braid."""
    return sorted(config.parent.name for config in SHIPPED.glob(f"*/{CONFIG}"))


def resolve(name_or_path: str | Path) -> Path:
    """Find a tokenizer's folder: a shipped name, or a path to a folder. A path must hold a slash or exist.

    Raises:
        CheckpointError: nothing there; the message lists the shipped names.
    """
    if str(name_or_path) in shipped_names():
        return SHIPPED / name_or_path
    folder = Path(name_or_path).expanduser()
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if not missing:
        return folder
    shipped = ", ".join(shipped_names()) or "none"
    if folder.is_dir():
        raise CheckpointError(
            f"{folder} is no tokenizer: it lacks {' and '.join(missing)}. Shipped tokenizers: {shipped}."
        )
    raise CheckpointError(
        f"no tokenizer {str(name_or_path)!r}: neither a shipped name ({shipped}) "
        f"nor a folder with {CONFIG} and {WEIGHTS}."
    )


def read_kind(folder: Path) -> str:
    """What kind of tokenizer a folder says that it holds, such as "image".

    Raises:
        CheckpointError: `config.json` is unreadable, or says nothing.
    """
    kind = _read(folder).get("kind")
    if not isinstance(kind, str):
        raise CheckpointError(f'{folder / CONFIG} states no "kind": it is not the config of a tokenizer of Braid.')
    return kind


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """Read `config.json`, without its "kind", which must be the one asked for.

    Raises:
        CheckpointError: unreadable, or a tokenizer of another kind.
    """
    config = _read(folder)
    found = config.pop("kind", None)
    if found != kind:
        raise CheckpointError(f"{folder} holds a tokenizer of kind {found!r}, but one of kind {kind!r} is wanted here.")
    return config


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"cannot read {folder / CONFIG}: {fault}") from fault
    return config if isinstance(config, dict) else {}


def read_weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Read the weights onto the CPU, floating-point tensors cast to `dtype`.

    Raises:
        CheckpointError: no safetensors file, or a damaged one.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"cannot read {folder / WEIGHTS}: {fault}. Copy or convert the weights again.") from fault
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Path:
    """Write `config.json` and `weights.safetensors`, each complete or not there at all.

    Args:
        folder: Made if it is not there.
        config: JSON values, with "kind".
        state_dict: Tensors on any device; floating-point ones are stored as `dtype` (float16 halves the file).

    Raises:
        CheckpointError: no "kind", or a weight that `dtype` cannot hold (not finite after the cast).
    """
    if config.get("kind") not in ("image", "audio"):
        raise CheckpointError(f'config needs "kind": "image" or "audio", found {config.get("kind")!r}.')
    stored: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        cast = tensor.detach().cpu()
        if cast.is_floating_point():
            cast = cast.to(dtype)
            if not torch.isfinite(cast).all():
                raise CheckpointError(
                    f"weight {name} is not finite as {dtype}; the training diverged or needs float32."
                )
        stored[name] = cast.clone(memory_format=torch.contiguous_format)
    folder.mkdir(parents=True, exist_ok=True)
    # Config last: a folder with a config always has its weights.
    save_file(stored, folder / f"{WEIGHTS}.part")
    (folder / f"{WEIGHTS}.part").chmod(0o644)  # safetensors writes for the owner alone.
    (folder / f"{WEIGHTS}.part").replace(folder / WEIGHTS)
    (folder / f"{CONFIG}.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / f"{CONFIG}.part").replace(folder / CONFIG)
    return folder


def checkpoint_sha256(folder: Path) -> str:
    """The tokenizer's identity: sha256 over the bytes of its config and its weights, 64 hex digits."""
    digest = hashlib.sha256()
    for file in (CONFIG, WEIGHTS):
        # The length keeps the boundary between the two files part of what is hashed.
        data = (folder / file).read_bytes()
        digest.update(f"{file}:{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()
