"""The heads' loss holds logits of one chunk of targets at a time, however many targets there are."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import MODALITIES, Targets
from model.heads import head_losses

TOKENS, WIDTH = 192, 2
"""So narrow that neither hidden states nor weights have more elements than a chunk of logits."""
SIZES = (128, 64, 64)
"""Multiples of 64, to which rows of logits are padded."""


class Elements(TorchDispatchMode):
    """Counts elements of the tensors that operations put out."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Of one tensor."""
        self.most = 0
        """Of all tensors that were there at the same time, each memory once."""
        self._there: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        self._there = [ref for ref in self._there if ref() is not None] + [weakref.ref(tensor) for tensor in made]
        held = {}
        for ref in self._there:
            if (tensor := ref()) is not None:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        self.most = max(self.most, sum(held.values()))
        return out


def naive_losses(hidden: Tensor, targets: list[Targets], weights: list[Tensor]) -> Tensor:
    losses = [
        F.cross_entropy(hidden[target.positions] @ weight.T, target.ids, reduction="sum")
        for target, weight in zip(targets, weights, strict=True)
    ]
    return torch.stack(losses).sum()


def elements(loss: Callable[[Tensor, list[Targets], list[Tensor]], Tensor], dtype: torch.dtype) -> Elements:
    """What a loss takes, forward and backward, where the heads share the positions evenly."""
    generator = torch.Generator().manual_seed(0)
    hidden, *weights = (
        torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_() for rows in (TOKENS, *SIZES)
    )
    targets = [
        Targets(positions=places, ids=torch.randint(size, places.shape, generator=generator), count=len(places))
        for places, size in zip(torch.arange(TOKENS).chunk(len(MODALITIES)), SIZES, strict=True)
    ]
    with Elements() as counted:
        loss(hidden, targets, weights).backward()
    for tensor in (hidden, *weights):
        assert tensor.grad is not None
        assert tensor.grad.any()
    return counted


def chunked(chunk: int) -> Callable[[Tensor, list[Targets], list[Tensor]], Tensor]:
    coefficients = torch.tensor([0.5, 0.25, 2.0])
    return lambda hidden, targets, weights: head_losses(hidden, targets, weights, coefficients, 0.1, chunk)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [4, 16])
def test_no_tensor_of_the_heads_loss_is_larger_than_a_chunk_of_logits(chunk: int, dtype: torch.dtype) -> None:
    logits = chunk * max(SIZES)
    assert max(TOKENS, *SIZES) * WIDTH < logits, "what does not depend on the chunk hides nothing"
    assert elements(chunked(chunk), dtype).largest == logits
    # What the bound is there to refuse: all logits of a head at once.
    everything = TOKENS // len(SIZES) * max(SIZES)
    assert elements(naive_losses, dtype).largest == everything > logits
    assert elements(chunked(TOKENS), dtype).largest == everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [4, 16])
def test_all_that_the_heads_loss_holds_at_once_is_three_chunks_of_logits_at_most(
    chunk: int, dtype: torch.dtype
) -> None:
    # The logits, their exponentials, and between the two a copy in float32; and what does not depend on the chunk.
    bound = 3 * chunk * max(SIZES) + 2 * (TOKENS + sum(SIZES)) * WIDTH
    assert elements(chunked(chunk), dtype).most <= bound
    assert elements(naive_losses, dtype).most > bound
    assert elements(chunked(TOKENS), dtype).most > bound
