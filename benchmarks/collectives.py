"""What ranks send each other, counted where torch hands it to the backend.

Enters: code that runs under `CountCollectives`. Leaves: by kind, how many collectives, and bytes of the whole that each is
about: what is gathered, what is reduced. Always holds: nothing is changed; works with gloo and NCCL alike.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}


class CountCollectives(TorchDispatchMode):
    """`calls` and `size` by kind: all_gather, reduce_scatter, all_reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.size: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in _KINDS:
            # Their first arguments are outputs, and then inputs.
            tensors = [a for a in _flat(args) if isinstance(a, torch.Tensor)]
            self.calls[_KINDS[name]] += 1
            self.size[_KINDS[name]] += max(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def _flat(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]
