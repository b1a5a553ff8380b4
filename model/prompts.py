"""Prompts of different lengths as groups that one forward pass reads into an empty cache.

Enters: padded prompts and their lengths. Leaves: groups of whole prompts, for kernels that take packed documents without any
padding between them, elsewhere as rows. Always holds: every prompt is in one group; a group has one prompt or at most
`MOST_TOKENS` tokens, so that reading 64 prompts takes no more memory than reading 16.

Shapes: B prompts, T tokens of the longest; b prompts of one group, t tokens of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TOKENS = 32768
"""Of a group: many enough that a GPU's products are as fast as they get."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptGroup:
    """What one forward pass reads."""

    token_ids: Tensor
    """int64 [b, t]; packed [1, t]."""
    modality_ids: Tensor
    rows: Tensor
    """int64 [b, 1]; packed [1, t]: the cache's row of each token."""
    positions: Tensor | None
    """int64 [1, t] if packed, index of each token in its prompt; else counted along the rows."""
    cu_seqlens: Tensor | None
    """int32 [b + 1] if packed."""
    max_seqlen: int
    last: tuple[Tensor, Tensor]
    """Where the last token of each prompt stands: row and column, int64 [b]."""


def prompt_groups(
    token_ids: Tensor, modality_ids: Tensor, lengths: Sequence[int], *, packed: bool
) -> Iterator[PromptGroup]:
    """Group prompts [B, T], each at the left of its row, in their order.

    Args:
        lengths: of each prompt, on the host.
        packed: whether attention takes documents packed into one row.
    """
    first = 0
    while first < len(lengths):
        end, tokens, longest = first, 0, 0
        while end < len(lengths):
            longest = max(longest, lengths[end])
            tokens = tokens + lengths[end] if packed else (end + 1 - first) * longest
            if tokens > MOST_TOKENS and end > first:
                break
            end += 1
        yield (_packed if packed else _padded)(token_ids, modality_ids, lengths[first:end], first)
        first = end


def _padded(token_ids: Tensor, modality_ids: Tensor, lengths: Sequence[int], first: int) -> PromptGroup:
    device, longest = token_ids.device, max(lengths)
    part = slice(first, first + len(lengths)), slice(longest)
    rows = torch.arange(len(lengths), device=device)
    return PromptGroup(
        token_ids=token_ids[part],
        modality_ids=modality_ids[part],
        rows=rows[:, None] + first,
        positions=None,
        cu_seqlens=None,
        max_seqlen=longest,
        last=(rows, torch.tensor(lengths, device=device) - 1),
    )


def _packed(token_ids: Tensor, modality_ids: Tensor, lengths: Sequence[int], first: int) -> PromptGroup:
    device = token_ids.device
    # Made on the host, where the lengths are: on the device, repeating by values would wait for them.
    counts = torch.tensor(lengths)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    which = torch.arange(len(lengths)).repeat_interleave(counts)
    positions = torch.arange(len(which)) - starts[which]
    rows, places = (which + first).to(device), positions.to(device)
    ends = (starts[1:] - 1).to(device)
    return PromptGroup(
        token_ids=token_ids[rows, places][None],
        modality_ids=modality_ids[rows, places][None],
        rows=rows[None],
        positions=places[None],
        cu_seqlens=starts.int().to(device),
        max_seqlen=max(lengths),
        last=(torch.zeros_like(ends), ends),
    )
