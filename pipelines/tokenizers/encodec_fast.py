"""EnCodec's encoder and quantizer on one CUDA device, several times as fast as the package's own modules.

Enters: float32 waveforms [B, F * hop] on the device. Leaves: int32 codes [B, F, n_q]. Always holds: a clip's codes do not
depend, bit by bit, on its neighbours, on their number, or on how much silence follows it.

Where the time goes, and what was tried: docs/decisions/0007-gpu-encoding.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tokenizers import encodec_kernels as kernels
from pipelines.tokenizers.encodec_layers import (
    FIRST_TILE,
    QUANTIZE_TILE,
    TILES_A_PROGRAM,
    Convolution,
    folded,
    padded,
    planes,
    unit_parts,
    unit_tile,
)
from pipelines.tokenizers.encodec_lstm import Recurrence

# Shapes: B clips, T samples or steps, C channels in, N channels out, D latent dimension, K codebooks, P planes.

FRONT_SAMPLES = 8 * 2**20
"""Clips go through the convolutions in groups of about so many samples: 1 GiB for the widest activation in two planes."""


class FastEncoder:
    """The weights of one network, laid out for the kernels, and the buffers of its LSTM.

    Args:
        network: An `EncodecNetwork`: causal, mono, one residual unit a stage, normalized by nothing but its weights.
        split: Two float16 planes for every operand, as exact as float32 needs; else one, in less time.
        device: A CUDA device.

    Raises:
        ValueError: an architecture that the kernels do not have; the message says what, and what to do.
    """

    def __init__(self, network: nn.Module, *, split: bool, device: str | torch.device) -> None:
        _check(network.config)
        self.split, self.device, self.hop = split, torch.device(device), int(network.config.hop)  # type: ignore[union-attr, arg-type]
        self.stored = torch.float32 if split else torch.float16
        """What a residual unit reads."""
        self.reflect = network.config.pad_mode == "reflect"  # type: ignore[union-attr]
        layers = list(network.get_submodule("encoder.model").children())
        weight, bias = folded(layers[0].get_submodule("conv.conv"))
        self.first_taps = weight.shape[2]
        first = F.pad(padded(weight, 0)[:, 0].T, (0, 0, 16 - self.first_taps, 0))
        self.first_weight = planes(first.to(self.device), True)
        self.first_bias = padded(bias, 0).to(self.device)
        units = [layer for layer in layers if hasattr(layer, "shortcut")]
        self.units = [[Convolution.of(part, split, self.device) for part in unit_parts(unit)] for unit in units]
        *self.strided, self.last = [
            Convolution.of(layer, split, self.device) for layer in layers[1:] if hasattr(layer, "conv")
        ]
        lstms = [layer.get_submodule("lstm") for layer in layers if hasattr(layer, "lstm")]
        self.recurrence = Recurrence(lstms[0], split=split, device=self.device) if lstms else None
        self.codebooks = Codebooks([book.embed for book in network.codebooks], self.device)  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, waveforms: Tensor, n_q: int) -> Tensor:
        """float32 [B, F * hop] -> int32 [B, F, n_q]; -1 in frames whose latents are not finite."""
        latents = self.latents(waveforms)
        return self.codebooks.nearest(latents.flatten(0, 1), n_q).view(*latents.shape[:2], n_q)

    def latents(self, waveforms: Tensor) -> Tensor:
        """float32 [B, F * hop] -> float32 [B, F, D], D a power of two."""
        waveforms = waveforms.contiguous()
        clips, samples = waveforms.shape
        frames = samples // self.hop
        if frames < self.last.taps or samples * self.strided[0].inputs >= 2**31:
            raise ValueError(
                f"clips of {frames} frames: the fast encoder takes {self.last.taps} to "
                f"{2**31 // self.strided[0].inputs // self.hop}; put silence behind shorter ones, and cut longer ones."
            )
        if self.recurrence:
            deep = self.recurrence.inputs(clips, frames)
        else:
            deep = torch.empty(1 + self.split, clips, frames, self.last.inputs, dtype=torch.float16, device=self.device)
        group = max(1, FRONT_SAMPLES // samples)
        for start in range(0, clips, group):
            self.front(waveforms[start : start + group], deep[:, start : start + group])
        if self.recurrence:
            deep = self.recurrence.run(clips, frames)
        out = torch.empty(clips, frames, self.last.outputs, dtype=torch.float32, device=self.device)
        self.last.run(deep, out, reflect=self.reflect, split=self.split)
        return out

    def front(self, waveforms: Tensor, deep: Tensor) -> None:
        """Everything before the LSTM: float32 [B, F * hop] -> `deep`, planes [P, B, F, C]."""
        x = waveforms
        for unit, convolution in zip(self.units, self.strided, strict=True):
            activated = self.unit(unit, x)
            clips, steps = activated.shape[1], activated.shape[2] // convolution.stride
            options = {"reflect": self.reflect, "split": self.split}
            if convolution is self.strided[-1]:
                convolution.run(activated, deep, activate=not self.recurrence, as_planes=True, **options)
            else:
                x = torch.empty(clips, steps, convolution.outputs, dtype=self.stored, device=self.device)
                convolution.run(activated, x, **options)

    def unit(self, unit: list[Convolution], x: Tensor) -> Tensor:
        """One residual unit, and before the first one the first convolution: [B, T] or [B, T, C] -> planes [P, B, T, C]."""
        inner, outer, skip = unit
        clips, steps = x.shape[:2]
        out = torch.empty(1 + self.split, clips, steps, skip.outputs, dtype=torch.float16, device=self.device)
        first = x.dim() == 2
        tile = FIRST_TILE if first else unit_tile(inner.inputs, self.split)
        options: dict[str, Any] = {
            "C": inner.inputs, "H": inner.outputs, "REFLECT": self.reflect, "SPLIT": self.split, "BM": tile.rows,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip
        if tile.columns:
            kernel, rows = kernels.wide_unit, tile.rows
            options |= {"BN": min(tile.columns, inner.inputs), "BK": min(tile.terms, inner.inputs)}
        else:
            kernel, rows = kernels.first_unit if first else kernels.narrow_unit, tile.rows * TILES_A_PROGRAM
            options |= {"TILES": TILES_A_PROGRAM} | ({"FIRST_TAPS": self.first_taps} if first else {})
        kernel[(clips * -(-steps // rows),)](
            x, *((self.first_weight, self.first_bias) if first else ()), inner.weight, inner.bias,
            outer.weight, skip.weight, outer.bias + skip.bias, out, out.stride(0), steps, **options,
        )  # fmt: skip
        return out


class Codebooks:
    """The codebooks as the search wants them: centred, scaled, and filled up to a power of two with entries out of reach."""

    def __init__(self, entries: Iterable[Tensor], device: torch.device) -> None:
        books = torch.stack([book.detach().cpu() for book in entries]).double()
        self.centres = books.mean(dim=1).float()
        centred = books - self.centres.double()[:, None]
        # A power of two, which rounds nothing, so that the largest value lies between 8 and 16.
        self.scales = 2.0 ** (4 - centred.abs().amax(dim=(1, 2)).clamp(min=1e-30).log2().ceil())
        scaled = padded(centred * self.scales[:, None, None], 1, 2)
        half_norms = scaled.square().sum(dim=2) / 2
        half_norms[:, books.shape[1] :] = math.inf
        self.exact, self.entries = padded(centred, 1, 2).float().to(device), planes(scaled.float(), True).to(device)
        self.centres, self.half_norms = padded(self.centres, 1).to(device), half_norms.float().to(device)
        self.scales = self.scales.float().to(device)

    def nearest(self, latents: Tensor, n_q: int) -> Tensor:
        """Residual codes of the first `n_q` codebooks: float32 [M, D] -> int32 [M, n_q]."""
        tile = QUANTIZE_TILE
        codes = torch.empty(len(latents), n_q, dtype=torch.int32, device=latents.device)
        kernels.quantize[(-(-len(latents) // tile.rows),)](
            latents, self.centres, self.scales, self.entries, self.entries.stride(0), self.half_norms, self.exact,
            codes, len(latents), K=n_q, D=latents.shape[1], ENTRIES=self.exact.shape[1],
            BM=tile.rows, BN=min(tile.columns, self.exact.shape[1]), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return codes


def _check(config: Any) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "channels": (1,), "causal": (True,), "n_residual_layers": (1,), "norm": ("none", "weight_norm"),
        "normalize": (False,),
    }  # fmt: skip
    faults = [
        f"{name} is {getattr(config, name)!r}, not {' or '.join(map(repr, values))}"
        for name, values in wanted.items()
        if getattr(config, name) not in values
    ]
    if faults:
        raise ValueError(f"no fast encoder for this architecture: {'; '.join(faults)}. Use dtype float32.")
