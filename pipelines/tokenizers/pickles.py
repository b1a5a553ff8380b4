"""Tensors out of files that others wrote: `.safetensors`, and pickles that cannot run code here.

Enters: a file of torch (`.ckpt`, `.th`, `.pt`, `.bin`) or of safetensors. Leaves: a state dict on the CPU. Always holds: a
pickle is read with `weights_only=True`, and may name nothing but tensors and what stands in `_ALLOWED`; anything else is
refused by its name before it is touched.
"""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipelines.tokenizers.checkpoint import CheckpointError


class _ModelCheckpoint:
    """Stands in for Lightning's callback, whose class is the key under which its state is stored."""


_SCALAR = importlib.import_module("numpy._core.multiarray").scalar
_NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), "float32", "float64")
_ALLOWED: list[Any] = [
    np.dtype,
    *(type(np.zeros((), name).dtype) for name in _NUMBERS),
    # A trainer's best score is a numpy scalar; numpy 2 moved the function that makes one.
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(
        (_ModelCheckpoint, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
        for package in ("pytorch_lightning", "lightning.pytorch")
    ),
]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint: a bare state dict, or the `state_dict` of a trainer's checkpoint.

    Raises:
        CheckpointError: unreadable, no state dict, or a pickle that names something other than data.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as fault:
            raise CheckpointError(f"cannot read {path}: {fault}. Copy or fetch it again.") from fault
    content = _read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, but a state dict is wanted.")
    odd = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{path} holds no state dict: under {odd[0]!r} stands no tensor; found keys {odd[:5]}.")
    return dict(content)


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            if zipfile.is_zipfile(path):
                # Read from the file without unpickling it, so that all names are told at once.
                _refuse(path, sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as fault:
        if named := re.search(r"GLOBAL (\S+)", str(fault)):
            _refuse(path, [named[1]])
        raise CheckpointError(f"cannot read {path}: {str(fault).splitlines()[0]}") from fault
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as fault:
        # What the reader raises on damaged bytes is not a closed list of its own making.
        raise CheckpointError(
            f"cannot read {path} as a checkpoint of torch ({type(fault).__name__}: {fault}); fetch it again."
        ) from fault


def _refuse(path: Path, names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"{path} is refused: it names {', '.join(names)}, and loading a pickle that names more than data can run any "
            "code. If you trust it, load it where it was made, and save its state_dict alone as .safetensors."
        )
