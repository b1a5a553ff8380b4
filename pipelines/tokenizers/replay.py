"""A training step as one CUDA graph: a thousand small launches become one.

Enters: a step, a function without arguments whose tensors all stay where they are. Leaves: the same function, replayed.
Always holds: a step that cannot be captured runs as it is, and says so with the whole error.

Source: the CUDA semantics notes of PyTorch, "Whole-network capture".
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

Outputs = TypeVar("Outputs")

WARMUP_CALLS = 8
"""Calls before the capture: libraries choose algorithms and the optimizer makes its state in the first ones."""


class Replay(Generic[Outputs]):
    """Calls a step eagerly at first, then captures it, then replays it.

    The step must draw no random numbers, wait for nothing, and return tensors without gradients: each replay writes them
    anew. Call it under `side_stream`, for autograd remembers the stream of a parameter's first use.

    Args:
        step: Forward, backward and optimizer step.
        enabled: False calls the step as it is, always.
        say: Told when the graph is there, or why not.
    """

    def __init__(self, step: Callable[[], Outputs], *, enabled: bool, say: Callable[[str], None]) -> None:
        self.step = step
        self.enabled = enabled
        self.say = say
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs

    def __call__(self) -> Outputs:
        """Do one step; its outputs hold until the next call."""
        if self.graph is not None:
            self.graph.replay()
            return self.outputs
        self.outputs = self.step()
        self.calls += 1
        if self.enabled and self.calls == WARMUP_CALLS:
            outputs = self.outputs
            try:
                # Capturing records the step without doing it.
                self.graph = self._capture()
                self.say(f"step captured as a CUDA graph after {self.calls} calls")
            except RuntimeError:
                # Slower by far, but the machine's time is already paid for.
                self.graph, self.outputs = None, outputs
                self.say(
                    f"NO CUDA GRAPH: capture failed, every step is now launched by hand.\n{traceback.format_exc()}"
                )
            else:
                return outputs
        return self.outputs

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self.outputs = self.step()
        return graph


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a CUDA device, work on a stream of its own, after what is under way and before what follows; else nothing."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)
