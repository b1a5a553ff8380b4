"""Released VQGANs under Braid's names: what taming-transformers stores as `model.yaml` and `last.ckpt`.

Enters: the content of the `.yaml` and the state dict of the `.ckpt`. Leaves: an `ImageTokenizerConfig` and weights that fit
it, with what was changed on the way. Known are `taming.models.vqgan.VQModel` and `GumbelVQ` on RGB pictures, of any
downsampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizerConfig, TowerConfig

_QUANTIZERS = {"taming.models.vqgan.VQModel": "nearest", "taming.models.vqgan.GumbelVQ": "gumbel"}
_BY_CODE = {
    "nearest": ("quantize.embedding.weight",),
    "gumbel": ("quantize.embed.weight", "quantize.proj.weight", "quantize.proj.bias"),
}
"""Tensors with one row a code."""
_FIXED = {"in_channels": 3, "out_ch": 3, "double_z": False, "resamp_with_conv": True, "give_pre_end": False}
_WHY = {
    "in_channels": "Braid's pictures are RGB",
    "out_ch": "Braid's pictures are RGB",
    "double_z": "the latents are means and variances, of an autoencoder without codes",
    "resamp_with_conv": "only convolutions halve and double the resolution in the network that Braid runs",
    "give_pre_end": "the decoder would give no picture",
}
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedImage:
    """What `write_checkpoint` needs, and what the card tells."""

    config: ImageTokenizerConfig
    weights: dict[str, Tensor]
    changes: tuple[str, ...]
    """What is not as in the source, a sentence each."""


def from_taming(values: Any, state: Mapping[str, Tensor], where: str, folder: Path) -> ConvertedImage:
    """Convert a VQGAN.

    Args:
        values: Of the `.yaml` file.
        where: That file, for errors.
        folder: To which paths in it are relative.

    Raises:
        CheckpointError: another model, one that Braid cannot run, or weights that do not fit the `.yaml`.
    """
    params, quantizer = _model(values, where)
    config, size = _image_config(params, quantizer, where), params["n_embed"]
    weights = {name: tensor for name, tensor in state.items() if name.startswith(_PARTS)}
    unknown = [name for name in state if not name.startswith((*_PARTS, "loss."))]
    if unknown:
        raise CheckpointError(f"{where}: the checkpoint has tensors of no VQGAN: {', '.join(sorted(unknown)[:5])}.")
    changes = []
    if left_out := len(state) - len(weights):
        changes.append(f"{left_out} tensors of the training loss, such as the discriminator, are left out.")
    if quantizer == "gumbel":
        changes.append(
            "The original draws noise for every code, also outside training; here each code is the one with the best score."
        )
    used = _used(weights.pop("quantize.used", None), params.get("remap"), size, where, folder)
    if used is not None:
        for name in _BY_CODE[quantizer]:
            # Of another length, it is refused below.
            if name in weights and len(weights[name]) == size:
                weights[name] = weights[name][used]
        config = dataclasses.replace(config, codebook_size=len(used))
        changes.append(
            f"The remap table keeps {len(used)} of {size} codes, numbered as in the table. A square whose best code is not "
            "among them gets the best of those; the original draws a random one."
        )
    _check(config, weights, where)
    return ConvertedImage(config=config, weights=weights, changes=tuple(changes))


def _model(values: Any, where: str) -> tuple[dict[str, Any], str]:
    """The parameters of the model, and its quantizer."""
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
        raise CheckpointError(
            f"{where}: no `model:` with `target:` and `params:`; give the model.yaml of the checkpoint."
        )
    if model.get("target") not in _QUANTIZERS:
        raise CheckpointError(
            f"{where}: target is {model.get('target')!r}, but converted are {' and '.join(_QUANTIZERS)}. A transformer's "
            "checkpoint names its VQGAN under first_stage_config; give that one's files."
        )
    params = model["params"]
    missing = [name for name in ("embed_dim", "n_embed", "ddconfig") if not params.get(name)]
    if missing:
        raise CheckpointError(f"{where}: params lack {', '.join(missing)}.")
    return params, _QUANTIZERS[model["target"]]


def _image_config(params: Mapping[str, Any], quantizer: str, where: str) -> ImageTokenizerConfig:
    shape = params["ddconfig"]
    defaults = {"double_z": True, "resamp_with_conv": True, "give_pre_end": False}
    for name, wanted in _FIXED.items():
        found = shape.get(name, defaults.get(name))
        if found != wanted:
            raise CheckpointError(f"{where}: ddconfig.{name} is {found!r}, but must be {wanted!r}: {_WHY[name]}.")
    try:
        tower = TowerConfig(
            ch=shape["ch"],
            ch_mult=tuple(shape.get("ch_mult", (1, 2, 4, 8))),
            num_res_blocks=shape["num_res_blocks"],
            attn_resolutions=tuple(shape["attn_resolutions"]),
        )
        if quantizer == "gumbel" and params["embed_dim"] != shape["z_channels"]:
            raise ValueError(f"embed_dim {params['embed_dim']} must be z_channels {shape['z_channels']} with GumbelVQ")
        return ImageTokenizerConfig(
            encoder=tower,
            decoder=tower,
            z_channels=shape["z_channels"],
            embed_dim=params["embed_dim"],
            codebook_size=params["n_embed"],
            resolution=shape["resolution"],
            quantizer=quantizer,
        )
    except KeyError as fault:
        raise CheckpointError(f"{where}: ddconfig lacks {fault}.") from fault
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"{where}: its numbers make no network: {fault}") from fault


def _used(stored: Tensor | None, remap: str | None, size: int, where: str, folder: Path) -> Tensor | None:
    """The codes that a remap table keeps, int64 in its order; None where there is no table."""
    if stored is None and remap is None:
        return None
    if stored is None:
        table = folder / str(remap)
        try:
            stored = torch.from_numpy(np.load(table, allow_pickle=False))
        except (OSError, ValueError, TypeError) as fault:
            raise CheckpointError(
                f"{where}: remap names {remap}, which is not in the checkpoint and cannot be read at {table} ({fault}); "
                "put it there, or take `remap` out to keep all codes."
            ) from fault
    used = stored.long().flatten()
    if not len(used) or used.min() < 0 or used.max() >= size or len(used.unique()) != len(used):
        raise CheckpointError(f"{where}: the remap table must name different codes in [0, {size}).")
    return used


def _check(config: ImageTokenizerConfig, weights: Mapping[str, Tensor], where: str) -> None:
    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in VQGAN(config).state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = [f"{name} is missing" for name in own.keys() - given.keys()]
    faults += [f"{name} has no place in it" for name in given.keys() - own.keys()]
    faults += [
        f"{name} has shape {list(given[name])}, not {list(own[name])}"
        for name in own.keys() & given.keys()
        if own[name] != given[name]
    ]
    if faults:
        raise CheckpointError(
            f"{where} describes another network than the checkpoint's: {'; '.join(sorted(faults)[:5])}."
        )
