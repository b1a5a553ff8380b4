"""A copy of weights and moments in host memory, from which they are written while training goes on.

Enters: the state that DCP takes, on whatever device. Leaves: the same state in host memory. Always holds: what was copied
stays as it is whatever training does; a copy out of page-locked memory is valid until the next one is made.

Page-locked memory is what a GPU copies to at the full speed of its link, some 50 GB/s rather than 3 to 6. Getting it is slow:
the kernel finds, clears and locks page after page, no faster than an ordinary copy. So it is done once (`lock`), at a moment
of our choosing, and kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map, tree_map_only


class Staging:
    """Host memory for the state of one rank; the state has the same tensors each time."""

    def __init__(self, device: torch.device, *, page_locked: bool) -> None:
        """
        Args:
            device: of the state.
            page_locked: whether to keep page-locked memory; else memory is found for each copy.
        """
        self._device = device
        self.page_locked = page_locked
        self._memory: Any = None

    @property
    def ready(self) -> bool:
        """Whether a copy takes no longer than copying."""
        return self._memory is not None or not self.page_locked

    @torch.no_grad()
    def lock(self, state: dict[str, Any]) -> int:
        """Get page-locked memory for such a state.

        Returns:
            Its bytes.

        Raises:
            RuntimeError: the machine does not give that much; from now on memory is found for each copy.
        """
        try:
            self._memory = tree_map_only(Tensor, lambda tensor: _room_for(tensor, page_locked=True), state)
        except RuntimeError:
            self._memory, self.page_locked = None, False
            raise
        sizes: list[int] = []
        tree_map_only(Tensor, lambda tensor: sizes.append(_local(tensor).nbytes), self._memory)
        return sum(sizes)

    @torch.no_grad()
    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the state is now; the device is done with it when this returns."""
        memory = self._memory
        if memory is None:
            memory = tree_map_only(Tensor, lambda tensor: _room_for(tensor, page_locked=False), state)
        # All copies are asked for before the first is waited for, so that the link is never idle between them.
        copied: dict[str, Any] = tree_map(_copy, memory, state)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return copied


def _room_for(tensor: Tensor, *, page_locked: bool) -> Tensor:
    """Host memory of a tensor's shape and type; for a sharded one, of this rank's shard."""
    local = _local(tensor)
    # Of a single number there are as many as weights, and page-locked memory comes in whole pages.
    room = torch.empty(local.shape, dtype=local.dtype, pin_memory=page_locked and local.numel() > 1)
    if not isinstance(tensor, DTensor):
        return room
    # Where the shard lies in the whole is all that DCP asks of the mesh, which stays the one of the device.
    return DTensor(room, tensor._spec, requires_grad=False)  # type: ignore[call-arg]


def _copy(room: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    _local(room).copy_(_local(value), non_blocking=True)
    return room


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
