"""Batches whose losses are told too high, wherever and however often a run takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pipelines.pretrain import faults, loop


def tell_spikes(
    batches: Collection[int], sequences: int, set_attribute: Callable[[Any, str, Any], None] = setattr
) -> None:
    """Let them spike, and let spikes be known from the third step on.

    Args:
        batches: counted from 1; looked at when a batch comes.
        sequences: of a batch.
        set_attribute: such as pytest's, which takes it back.
    """
    compute = loop.forward_backward

    def told(model: Any, batch: Any, *more: Any, **named: Any) -> Any:
        losses = compute(model, batch, *more, **named)
        if sum(batch.after.taken.values()) // sequences in batches:
            losses.sums.mul_(1e6)
        return losses

    set_attribute(loop, "forward_backward", told)
    set_attribute(faults, "_LEARNING", 2)
