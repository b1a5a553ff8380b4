"""Released EnCodec models under Braid's names: the package's state dicts, and Hugging Face's `EncodecModel`.

Enters: a state dict, and for Hugging Face its `config.json`. Leaves: an `AudioTokenizerConfig` and plain weights that fit it,
with what was changed on the way. Always holds: the same file gives the same bytes on every machine, for their sha256 is the
tokenizer's identity.

A state dict of the package states no architecture, but its shapes do. They leave two things open, and the released models
settle them: weight normalization is that of the causal 24 kHz model, norms over time are those of the 48 kHz model, which
works on segments of one second, each scaled to one loudness. The package lets segments overlap by 1%; here they follow one
another, so that every frame is one moment and a clip of n samples has ceil(n / hop) frames. What the package returns with
`overlap = 0` is what Braid returns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.checkpoint import CheckpointError

_FIRST = "encoder.model.0.conv."
_WEIGHT = r"(?:weight|weight_v|parametrizations\.weight\.original1)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedAudio:
    """What `write_checkpoint` needs, and what the card tells."""

    config: AudioTokenizerConfig
    weights: dict[str, Tensor]
    changes: tuple[str, ...]
    """What is not as in the source, a sentence each."""


def from_encodec(state: Mapping[str, Tensor], where: str) -> ConvertedAudio:
    """Convert a state dict of the package encodec, such as the two released ones.

    Raises:
        CheckpointError: not that layout.
    """
    if not any(name.startswith(_FIRST) for name in state):
        raise CheckpointError(f"{where}: no EnCodec model: no tensor is named {_FIRST}*; found {sorted(state)[:3]}.")
    by_time = f"{_FIRST}norm.weight" in state
    shape = _shape(state, where)
    config = _audio_config(
        {
            **shape,
            "sample_rate_hz": 48_000 if by_time else 24_000,
            "causal": not by_time,
            "pad_mode": "reflect",
            "norm": "time_group_norm" if by_time else "none",
        },
        normalize=by_time,
        segment_s=1.0 if by_time else None,
        where=where,
    )
    return _converted(config, state, overlap=0.01 if by_time else 0.0)


def from_hugging_face(values: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> ConvertedAudio:
    """Convert an `EncodecModel` of transformers.

    Args:
        values: Of its `config.json`; keys that are missing have the defaults of that class.

    Raises:
        CheckpointError: another kind of model, or one that Braid cannot run.
    """
    if values.get("model_type") != "encodec":
        raise CheckpointError(f'{where}: model_type is {values.get("model_type")!r}, but "encodec" is converted.')
    fixed: dict[str, Any] = {
        "kernel_size": 7,
        "last_kernel_size": 7,
        "residual_kernel_size": 3,
        "dilation_growth_rate": 2,
    }
    fixed |= {"compress": 2, "trim_right_ratio": 1.0, "codebook_dim": values.get("hidden_size", 128)}
    for name, known in fixed.items():
        if values.get(name) not in (None, known):
            raise CheckpointError(f"{where}: {name} is {values[name]!r}; only models with {known!r} can be converted.")
    named = {_renamed(name, state): tensor for name, tensor in state.items()}
    shape = _shape(named, where)
    given = {
        "sample_rate_hz": values.get("sampling_rate", 24_000),
        "causal": values.get("use_causal_conv", True),
        "pad_mode": values.get("pad_mode", "reflect"),
        "norm": "time_group_norm" if values.get("norm_type") == "time_group_norm" else "none",
    }
    config = _audio_config(
        {**shape, **given},
        normalize=values.get("normalize", False),
        segment_s=values.get("chunk_length_s"),
        where=where,
    )
    return _converted(config, named, overlap=values.get("overlap") or 0.0)


def _audio_config(
    values: Mapping[str, Any], *, normalize: bool, segment_s: float | None, where: str
) -> AudioTokenizerConfig:
    hop = math.prod(values["ratios"])
    samples = None if segment_s is None else int(segment_s * values["sample_rate_hz"])
    if samples is not None and samples % hop:
        raise CheckpointError(f"{where}: segments of {samples} samples are no whole number of frames of {hop}.")
    return AudioTokenizerConfig.from_json(
        {
            **values,
            "n_q": values["n_q"] + normalize,
            "normalize": normalize,
            "segment_frames": None if samples is None else samples // hop,
        },
        where,
    )


def _shape(state: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The fields of `AudioTokenizerConfig` that the shapes of the encoder and of the codebooks show."""
    strided: dict[int, Tensor] = {}
    blocks: set[int] = set()
    for name, tensor in state.items():
        if found := re.fullmatch(rf"encoder\.model\.(\d+)\.conv\.conv\.{_WEIGHT}", name):
            strided[int(found[1])] = tensor
        elif found := re.match(r"encoder\.model\.(\d+)\.block\.", name):
            blocks.add(int(found[1]))
    codebooks = [tensor for name, tensor in state.items() if name.endswith("._codebook.embed")]
    if len(strided) < 3 or not blocks or not codebooks:
        raise CheckpointError(
            f"{where}: no whole EnCodec model: {len(strided)} convolutions, {len(blocks)} residual blocks, "
            f"{len(codebooks)} codebooks found."
        )
    first, *middle, last = (strided[index] for index in sorted(strided))
    if len(blocks) % len(middle):
        raise CheckpointError(
            f"{where}: {len(blocks)} residual blocks for {len(middle)} strides; equally many each are known."
        )
    return {
        "n_q": len(codebooks),
        "codebook_size": len(codebooks[0]),
        "channels": first.shape[1],
        "n_filters": first.shape[0],
        # A strided convolution's kernel is twice its stride; the encoder has the decoder's ratios from behind.
        "ratios": tuple(weight.shape[2] // 2 for weight in reversed(middle)),
        "dimension": last.shape[0],
        "n_residual_layers": len(blocks) // len(middle),
        "lstm": sum(bool(re.fullmatch(r"encoder\.model\.\d+\.lstm\.weight_ih_l\d+", name)) for name in state),
        "true_skip": not any(".shortcut." in name for name in state),
    }


def _renamed(name: str, state: Mapping[str, Tensor]) -> str:
    """A name of Hugging Face's as the package has it."""
    name = re.sub(r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook.", name)
    inner = re.match(r"^((?:encoder|decoder)\.layers\.\d+(?:\.block\.\d+|\.shortcut)?)\.(conv|norm)\.(.*)$", name)
    if inner:
        place, kind, rest = inner.groups()
        around, core = ("convtr", "convtr") if _is_transposed(place, state) else ("conv", "conv")
        name = f"{place}.{around}.{core if kind == 'conv' else 'norm'}.{rest}"
    return re.sub(r"^(encoder|decoder)\.layers\.", r"\1.model.", name)


def _is_transposed(place: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a layer of the decoder goes up: all its own convolutions but the first and the last do."""
    layers = {int(found[1]) for name in state if (found := re.match(r"decoder\.layers\.(\d+)\.conv\.", name))}
    found = re.fullmatch(r"decoder\.layers\.(\d+)", place)
    return found is not None and int(found[1]) not in (min(layers), max(layers))


def _converted(config: AudioTokenizerConfig, state: Mapping[str, Tensor], *, overlap: float) -> ConvertedAudio:
    weights, folded = fold_weight_norm(state)
    changes = []
    if folded:
        changes.append(
            f"Weight normalization of {folded} layers is folded into plain weights, computed in float64 and rounded once; "
            "the package computes it in float32 in every call, so about one code in some thousands may differ."
        )
    if config.channels > 1:
        changes.append(
            "The model is stereo, Braid's sound is mono: both sides hear the same, and are averaged afterwards."
        )
    if config.normalize:
        changes.append(
            "The scale of each segment, which the original keeps as a number beside the codes, is the first codebook here, "
            f"in equal steps of dB; {config.quantizers} codebooks of the quantizer follow, with the original's codes."
        )
    if overlap:
        changes.append(
            f"The original lets segments overlap by {overlap:.0%} and fades between them; here one follows the other, and "
            "the codes are those of the original with an overlap of 0."
        )
    return ConvertedAudio(config=config, weights=weights, changes=tuple(changes))


def fold_weight_norm(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Plain weights for those stored as direction v and length g, in either naming of torch; and how many there were.

    Sums are rounded once, whatever the order, so that every machine gives the same bits.
    """
    folded: dict[str, Tensor] = {}
    count = 0
    for name, tensor in state.items():
        if name.endswith((".weight_v", ".parametrizations.weight.original1")):
            continue
        stem = name.removesuffix(".weight_g").removesuffix(".parametrizations.weight.original0")
        if stem == name:
            folded[name] = tensor
            continue
        pair = f"{stem}.weight_v" if name.endswith("_g") else f"{stem}.parametrizations.weight.original1"
        if pair not in state:
            raise CheckpointError(f"weight normalization is not whole: {name} is there, {pair} is not.")
        direction = state[pair].double()
        squares = direction.square().flatten(1).tolist()
        lengths = torch.tensor([math.sqrt(math.fsum(row)) for row in squares], dtype=torch.float64)
        ratio = tensor.double().flatten() / lengths
        folded[f"{stem}.weight"] = (direction * ratio.view(-1, *[1] * (direction.ndim - 1))).float()
        count += 1
    return folded, count
