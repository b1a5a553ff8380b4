"""Any number of items through a GPU function that takes a fixed number.

What enters: NumPy arrays of one shape. What leaves: the function's results, in order. What always holds: the function
sees batches of one size, the last filled up with zeros, because GPU libraries choose their algorithms by size and other
algorithms round otherwise; so what becomes of an item does not depend on how many came with it. While the GPU computes
one batch, the next is on its way: over pinned memory, on a stream of its own. One thread alone may call it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Lane:
    """One of the two ways to the GPU, which take turns."""

    staged: Tensor
    """In pinned memory."""
    given: Tensor
    """On the GPU."""
    copied: torch.cuda.Event
    """`staged` may be written again."""
    taken: torch.cuda.Event
    """`given` may be written again."""

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "_Lane":
        staged = torch.empty(shape, dtype=dtype, pin_memory=True)
        return cls(staged, torch.empty(shape, dtype=dtype, device=device), torch.cuda.Event(), torch.cuda.Event())


class FixedBatches:
    """A function on the GPU, run over arrays."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], batch_size: int, device: torch.device, *, graph: bool
    ) -> None:
        """Prepare to run `function`.

        Args:
            function: Takes [batch_size, ...] on `device` and returns one result an item, on `device`.
            graph: Record the function once for each shape of item and replay it, which spares the time to launch its many
                kernels. It must then do the same for all values, and never wait for the GPU.
        """
        self.function = function
        self.batch_size = batch_size
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._lanes: dict[tuple[tuple[int, ...], torch.dtype], list[_Lane]] = {}
        """Kept from call to call, so that their events order the copies of one call behind the work of the last."""
        self._turn = 0
        self._graphs: dict[tuple[int, ...], Callable[[Tensor], Tensor]] | None = {} if graph else None
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, items: Sequence[NDArray[Any]] | NDArray[Any]) -> NDArray[Any]:
        """Results of all items; there must be at least one."""
        return self.start(items)()

    def start(self, items: Sequence[NDArray[Any]] | NDArray[Any]) -> Callable[[], NDArray[Any]]:
        """Hand all items to the GPU and return at once with what waits for their results.

        Whoever starts the next items before asking for these keeps the GPU busy between the two.
        """
        with torch.cuda.device(self.device):
            return self._start(items)

    def _start(self, items: Sequence[NDArray[Any]] | NDArray[Any]) -> Callable[[], NDArray[Any]]:
        shape = (self.batch_size, *items[0].shape)
        dtype = torch.from_numpy(items[0][:0].copy()).dtype
        if (shape, dtype) not in self._lanes:
            self._lanes[shape, dtype] = [_Lane.of(shape, dtype, self.device) for _ in range(2)]
        compute = self.function if self._graphs is None else self._recorded(shape, dtype, self._graphs)
        now = torch.cuda.current_stream()
        results = []
        for start in range(0, len(items), self.batch_size):
            lane = self._lanes[shape, dtype][self._turn]
            self._turn = 1 - self._turn
            lane.copied.synchronize()
            part = items[start : start + self.batch_size]
            fill(lane.staged, part)
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(lane.taken)
                lane.given.copy_(lane.staged, non_blocking=True)
                lane.copied.record()
            now.wait_event(lane.copied)
            results.append(compute(lane.given))
            lane.taken.record()
        found = torch.cat(results)[: len(items)]
        landed = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def result() -> NDArray[Any]:
            done.synchronize()
            return landed.numpy().copy()

        return result

    def _recorded(
        self, shape: tuple[int, ...], dtype: torch.dtype, graphs: dict[tuple[int, ...], Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        """The function as a graph. All graphs share their memory, so a result is copied before the next replay."""
        if shape not in graphs:
            given = torch.zeros(shape, dtype=dtype, device=self.device)
            self.function(given)  # Compiles kernels and lets libraries choose theirs, which recording cannot.
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads page-lock memory meanwhile, which would spoil the capture of a whole process.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = self.function(given)

            def replay(batch: Tensor) -> Tensor:
                given.copy_(batch)
                graph.replay()
                return result.clone()

            graphs[shape] = replay
        return graphs[shape]


def fill(staged: Tensor, items: Sequence[NDArray[Any]] | NDArray[Any]) -> None:
    """Write items into the first rows of a batch, and zeros into the others."""
    rows = staged[: len(items)]
    # One call, for after each the thread would have to wait for Python's lock, which other threads want too.
    torch.stack([torch.from_numpy(np.require(item, requirements=["C", "W"])) for item in items], out=rows)
    staged[len(items) :] = 0
