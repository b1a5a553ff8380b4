"""The LSTM of an EnCodec encoder on a GPU.

Enters: planes [P, B, T, C], written where `Recurrence.inputs` says. Leaves: ELU(input + LSTM(input)), as planes again.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tokenizers import encodec_kernels as kernels
from pipelines.tokenizers.encodec_layers import LSTM_TILE, Convolution, planes, power_of_two

# Shapes: B clips, T steps, C channels, P planes.

GRAPH_STEPS = 32
"""Steps that are launched at once, as one CUDA graph."""


class Recurrence:
    """The LSTM, one kernel a step, its launches in CUDA graphs. In its buffers time is the slowest dimension.

    Each layer has a stream of its own and follows the one before it by a stretch of `GRAPH_STEPS`, since a step of one
    layer fills no GPU. Buffers keep their place while they are large enough, and graphs with them.
    """

    def __init__(self, lstm: nn.Module, *, split: bool, device: torch.device) -> None:
        self.split, self.device = split, device
        self.width = int(lstm.hidden_size)  # type: ignore[arg-type]
        self.size = power_of_two(self.width)
        self.layers = []
        for layer in range(int(lstm.num_layers)):  # type: ignore[arg-type]
            into, around = (self._weight(getattr(lstm, f"weight_{name}_l{layer}")) for name in ("ih", "hh"))
            bias = self._gates(getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}"))
            self.layers.append((Convolution(into, bias.to(device), 1, 1), around))
        self._storage: dict[str, Tensor] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._streams = [torch.cuda.Stream(device) for _ in self.layers] if device.type == "cuda" else []

    def inputs(self, clips: int, steps: int) -> Tensor:
        """Where the LSTM's input goes: planes [P, clips, steps, C]."""
        rows, stretches, layers = power_of_two(clips), -(-steps // GRAPH_STEPS) * GRAPH_STEPS, range(len(self.layers))
        place = (1 + self.split, rows, self.size)
        self.given = self._buffer("given", torch.float16, stretches, *place)
        self.out = self._buffer("out", torch.float16, stretches, *place)
        self.hidden = [self._buffer(f"hidden {layer}", torch.float16, stretches + 1, *place) for layer in layers]
        self.gates = [
            self._buffer(f"gates {layer}", torch.float32, GRAPH_STEPS, rows, 4 * self.size) for layer in layers
        ]
        self.cell = [self._buffer(f"cell {layer}", torch.float32, rows, self.size) for layer in layers]
        self.clock = [self._buffer(f"clock {layer}", torch.int32, 1) for layer in layers]
        return self.given[:steps, :, :clips].permute(1, 2, 0, 3)

    def run(self, clips: int, steps: int) -> Tensor:
        """ELU(input + LSTM(input)) of what stands in `inputs(clips, steps)`, planes [P, clips, steps, C]."""
        for hidden, cell, clock in zip(self.hidden, self.cell, self.clock, strict=True):
            for state in (hidden[0], cell, clock):
                state.zero_()
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        for start in range(0, steps, GRAPH_STEPS):
            for index in range(len(self.layers)):
                with torch.cuda.stream(self._streams[index]) if self._streams else nullcontext():
                    if index and self._streams:
                        self._streams[index].wait_stream(self._streams[index - 1])
                    self._stretch(index, start)
        for stream in self._streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return self.out[:steps, :, :clips].permute(1, 2, 0, 3)

    def _stretch(self, index: int, start: int) -> None:
        """`GRAPH_STEPS` steps of one layer. Those beyond the end of the clips compute what nobody reads."""
        source = self.hidden[index - 1][1:] if index else self.given
        x = source[start : start + GRAPH_STEPS].permute(1, 2, 0, 3)
        self.layers[index][0].run(x, self.gates[index].transpose(0, 1), reflect=False, split=self.split)
        if self.device.type == "cuda":
            self._graph(index).replay()
        else:
            self._steps(index)

    def _steps(self, index: int) -> None:
        tile, rows = LSTM_TILE, self.given.shape[2]
        for offset in range(GRAPH_STEPS):
            kernels.lstm_step[(-(-rows // tile.rows) * (self.size // tile.columns),)](
                self.gates[index], self.hidden[index], self.cell[index], self.layers[index][1], self.given, self.out,
                self.clock[index], offset, rows,
                D=self.size, SPLIT=self.split, LAST=index == len(self.layers) - 1,
                BM=tile.rows, BN=tile.columns, BK=min(tile.terms, self.size),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        self.clock[index] += GRAPH_STEPS

    def _graph(self, index: int) -> torch.cuda.CUDAGraph:
        key = index, self.given.shape[2]
        if key not in self._graphs:
            states = self.cell[index], self.clock[index]
            before = [state.clone() for state in states]
            self._steps(index)  # Compiles the kernel, which a capture must not.
            for state, old in zip(states, before, strict=True):
                state.copy_(old)
            torch.cuda.synchronize(self.device)
            self._graphs[key] = torch.cuda.CUDAGraph()
            # Other threads page-lock memory meanwhile, which would spoil the capture of a whole process.
            with torch.cuda.graph(self._graphs[key], capture_error_mode="thread_local"):
                self._steps(index)
        return self._graphs[key]

    @torch.inference_mode(False)  # Or a caller out of that mode could not use them.
    def _buffer(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._storage or self._storage[name].numel() < size:
            self._graphs.clear()
            # Zeros, since steps beyond a clip's end and rows beside the clips are computed too.
            self._storage[name] = torch.zeros(size, dtype=dtype, device=self.device)
        return self._storage[name][:size].view(shape)

    def _weight(self, weight: Tensor) -> Tensor:
        """torch's [4 * hidden, inputs] -> planes [P, size, 4 * size]."""
        weight = F.pad(weight.detach(), (0, self.size - self.width))
        return planes(self._gates(weight).T.to(self.device), self.split)

    def _gates(self, rows: Tensor) -> Tensor:
        """torch's rows [4 * hidden, ...], one gate after the other -> [size * 4, ...], the gates of one channel together."""
        rows = rows.detach().float().cpu().unflatten(0, (4, self.width)).transpose(0, 1)
        return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, self.size - self.width]).flatten(0, 1)
