"""The convolutions of an EnCodec encoder as the kernels want them, and how the kernels cut their work.

Enters: the package's modules. Leaves: float16 planes of weights, channels filled up with zeros to powers of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tokenizers import encodec_kernels as kernels

# Shapes: B clips, T steps, C channels in, N channels out, P planes.


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work: rows, columns and terms of a tile, warps, stages of its pipeline."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int


def unit_tile(channels: int, split: bool) -> Tile:
    """For the residual unit of so many channels; its columns are 0 where a program holds all weights."""
    if channels <= 64:
        return Tile(64, 0, 0, 4, 2)
    if channels <= 128:
        return Tile(64, 128, 32, 4, 2) if split else Tile(64, 64, 64, 4, 2)
    return Tile(64, 128, 32, 4, 3)


def convolution_tile(channels: int, columns: int) -> Tile:
    """For a convolution from `channels` to `columns`."""
    return Tile(128, min(columns, 128), min(channels, 64), 8 if columns > 64 else 4, 3)


FIRST_TILE = Tile(128, 0, 0, 4, 2)
LSTM_TILE = Tile(64, 16, 64, 4, 3)
QUANTIZE_TILE = Tile(128, 128, 0, 8, 2)
TILES_A_PROGRAM = 8
"""Tiles that one program works through, where it holds all weights."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """One causal convolution: planes [P, taps * C, N] and bias [N], zero where channels were added."""

    weight: Tensor
    bias: Tensor
    taps: int
    stride: int

    @classmethod
    def of(cls, layer: nn.Module, split: bool, device: torch.device) -> Convolution:
        """From one of the package's `SConv1d`."""
        convolution: Any = layer.get_submodule("conv.conv")
        weight, bias = folded(convolution)
        matrix = padded(weight, 0, 1).permute(2, 1, 0).flatten(0, 1)
        return cls(planes(matrix.to(device), split), padded(bias, 0).to(device), weight.shape[2], convolution.stride[0])

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] // self.taps

    @property
    def outputs(self) -> int:
        return self.weight.shape[2]

    def run(
        self, x: Tensor, out: Tensor, *, reflect: bool, split: bool, activate: bool = False, as_planes: bool = False
    ) -> None:
        """x: planes [P, B, T * stride, C], out: [B, T, N], or planes [P, B, T, N] with `as_planes`; strides are free."""
        place = out[0] if as_planes else out
        clips, steps, _ = place.shape
        tile = convolution_tile(self.inputs, self.outputs)
        kernels.convolution[(-(-clips * steps // tile.rows) * (self.outputs // tile.columns),)](
            x, x.stride(0), x.stride(1), x.stride(2), self.weight, self.bias,
            out, out.stride(0), place.stride(0), place.stride(1), clips * steps, steps,
            C=self.inputs, N=self.outputs, TAPS=self.taps, STRIDE=self.stride, REFLECT=reflect,
            SPLIT=split, PLANES=as_planes, ACTIVATE=activate,
            BM=tile.rows, BN=tile.columns, BK=tile.terms, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def folded(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [N, C, taps] with its weight normalization applied, and bias [N]."""
    module: Any = convolution
    weight = module.weight
    if hasattr(module, "weight_g"):
        weight = module.weight_v * (module.weight_g / module.weight_v.norm(dim=(1, 2), keepdim=True))
    bias = module.bias if module.bias is not None else weight.new_zeros(len(weight))
    return weight.detach().float().cpu(), bias.detach().float().cpu()


def unit_parts(unit: nn.Module) -> list[nn.Module]:
    """The three convolutions of a residual unit: wide, narrow, and around them."""
    inner, outer, skip = (unit.get_submodule(name) for name in ("block.1", "block.3", "shortcut"))
    if isinstance(skip, nn.Identity):
        channels = len(folded(outer.get_submodule("conv.conv"))[1])
        skip = nn.Module()
        skip.conv = nn.Module()
        skip.conv.conv = nn.Conv1d(channels, channels, 1, bias=False)
        nn.init.dirac_(skip.conv.conv.weight)
    return [inner, outer, skip]


def planes(weight: Tensor, split: bool) -> Tensor:
    """float32 [...] -> float16 [P, ...]: the value, and with `split` what rounding took from it."""
    high = weight.half()
    return torch.stack([high, (weight - high.float()).half()] if split else [high]).contiguous()


def padded(tensor: Tensor, *dimensions: int) -> Tensor:
    """Zeros appended until each of these dimensions is a power of two."""
    for dimension in dimensions:
        missing = power_of_two(tensor.shape[dimension]) - tensor.shape[dimension]
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dimension) + [0, missing])
    return tensor


def power_of_two(size: int) -> int:
    """The next power of two, at least 16, the smallest that tensor cores take."""
    return max(16, 2 ** math.ceil(math.log2(size)))
