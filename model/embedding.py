"""The embedding of a token: the row of its modality's table, plus the modality's own vector.

Enters: ids and modality ids. Leaves: [B, T, D]. Always holds: shapes do not depend on values, and every table gets a gradient
from every batch. Where tables have float32 sums for their gradients, rows are added to these, and no gradient of the
size of a table exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.products import accumulates_in_float32


def embed(token_ids: Tensor, modality_ids: Tensor, modality_table: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Embed int64 [B, T] ids; table m belongs to modality id m."""
    if all(accumulates_in_float32(table) for table in (modality_table, *tables)):
        return _Embedding.apply(token_ids, modality_ids, modality_table, *tables)
    return _embedded(token_ids, modality_ids, modality_table, tables)


def _embedded(token_ids: Tensor, modality_ids: Tensor, modality_table: Tensor, tables: Sequence[Tensor]) -> Tensor:
    # Every table is read at every position and `where` picks.
    x = F.embedding(modality_ids, modality_table)
    chosen = torch.zeros_like(x)
    for index, table in enumerate(tables):
        here = modality_ids == index
        chosen = torch.where(here[..., None], F.embedding(torch.where(here, token_ids, 0), table), chosen)
    return x + chosen


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, token_ids: Tensor, modality_ids: Tensor, modality_table: Tensor, *tables: Tensor
    ) -> Tensor:
        ctx.save_for_backward(token_ids, modality_ids, modality_table, *tables)
        return _embedded(token_ids, modality_ids, modality_table, tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, ...]:
        token_ids, modality_ids, modality_table, *tables = ctx.saved_tensors
        grad = grad_output.flatten(0, -2).float()
        ids, modalities = token_ids.flatten(), modality_ids.flatten()
        which = F.one_hot(modalities, len(modality_table)).to(grad.dtype)
        modality_table.grad.addmm_(which.T, grad)
        slots = torch.arange(len(ids), device=ids.device)
        for index, table in enumerate(tables):
            here = modalities == index
            # Rows of other modalities add zeros, and spread over the table so that they do not queue for one row.
            table.grad.index_add_(0, torch.where(here, ids, slots % len(table)), grad * here[:, None])
        return (None,) * (3 + len(tables))
