"""A copy of weights and moments in host memory, from which they are written while training goes on.

Enters: the state that DCP takes, on whatever device. Leaves: the same state in host memory. Always holds: what was copied
stays as it is whatever training does; a copy out of page-locked memory is valid until the next one is made.

Page-locked memory is what a GPU copies to at the full speed of its link, some 50 GB/s rather than 3 to 6. Getting it is slow:
the kernel finds, clears and locks page after page, no faster than an ordinary copy. So it is done once (`lock`), at a moment
of our choosing, and kept. It is one piece of the machine's memory, locked where it lies: torch's own page-locked memory comes
in powers of two, up to twice of what is asked for, and stays with the process when a later piece cannot be had.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map, tree_map_only

_ALIGNMENT = 64
"""Bytes: where a tensor may begin."""


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
            RuntimeError, OSError: the machine does not give that much; from now on memory is found for each copy.
        """
        places: list[int] = [0]
        tree_map_only(Tensor, lambda tensor: places.append(places[-1] + _padded(_local(tensor).nbytes)), state)
        try:
            pages = _page_locked(max(places[-1], 1))
        except (RuntimeError, OSError):
            self.page_locked = False
            raise
        # They are unlocked before they go, whatever else refers to them.
        weakref.finalize(self, _unlock, pages)
        starts = iter(places)

        def room(tensor: Tensor) -> Tensor:
            start, local = next(starts), _local(tensor)
            if not local.numel():
                return _as(tensor, torch.empty_like(local, device="cpu"))
            # A storage of its own, for whoever writes a part of a storage copies it first.
            memory = torch.frombuffer(pages, dtype=local.dtype, count=local.numel(), offset=start)
            return _as(tensor, memory.view(local.shape))

        self._memory = tree_map_only(Tensor, room, state)
        return places[-1]

    @torch.no_grad()
    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the state is now; the device is done with it when this returns."""
        memory = self._memory
        if memory is None:
            memory = tree_map_only(
                Tensor, lambda tensor: _as(tensor, torch.empty_like(_local(tensor), device="cpu")), state
            )
        # All copies are asked for before the first is waited for, so that the link is never idle between them.
        copied: dict[str, Any] = tree_map(_copy, memory, state)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return copied


def _page_locked(size: int) -> mmap.mmap:
    """So many bytes of memory, none of which the kernel may move.

    Raises:
        RuntimeError, OSError: the machine or the driver does not give them.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to lock memory for")
    pages = mmap.mmap(-1, size)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(_address(pages), size, 0)))
    return pages


def _unlock(pages: mmap.mmap) -> None:
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(_address(pages))


def _address(pages: mmap.mmap) -> int:
    return torch.frombuffer(pages, dtype=torch.uint8).data_ptr()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _as(tensor: Tensor, room: Tensor) -> Tensor:
    """Memory for a tensor, or for this rank's shard, in the place of the whole."""
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
