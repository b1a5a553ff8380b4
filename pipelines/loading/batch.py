"""Rows of packed sequences to the batch that the model trains on.

Enters: `Rows`. Leaves: a `PackedBatch`, whose targets are next tokens, each given to the head of its own modality.
Always holds: shapes take few values, so that compiled code is seldom compiled again.
"""

from __future__ import annotations

import numpy as np
import torch

from model import IGNORE_INDEX, MODALITIES, PackedBatch, Targets
from pipelines.loading.index import Int32s, Int64s
from pipelines.loading.windows import Rows


def pack(rows: Rows, pieces_per_sequence: int, target_sizes: int) -> PackedBatch:
    """Give document boundaries and targets their shapes.

    Args:
        rows: B rows of T tokens.
        pieces_per_sequence: the most pieces that a row holds.
        target_sizes: the targets of a modality are padded to the next multiple of B*T / `target_sizes`, one at least.
    """
    B, T = rows.token_ids.shape
    # One more for the padding of each row.
    cu_seqlens = np.full(B * (pieces_per_sequence + 1) + 1, B * T, np.int32)
    starts = np.flatnonzero(rows.positions.reshape(-1) == 0)
    cu_seqlens[: len(starts)] = starts
    next_ids, next_modality_ids = rows.next_ids.reshape(-1), rows.next_modality_ids.reshape(-1)
    unit = -(-B * T // target_sizes)
    return PackedBatch(
        token_ids=torch.from_numpy(rows.token_ids),
        modality_ids=torch.from_numpy(rows.modality_ids),
        positions=torch.from_numpy(rows.positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=T,
        targets={
            name: _targets(np.flatnonzero(next_modality_ids == modality), next_ids, unit)
            for modality, name in enumerate(MODALITIES)
        },
    )


def _targets(positions: Int64s, next_ids: Int32s, unit: int) -> Targets:
    count = len(positions)
    capacity = max(1, -(-count // unit)) * unit
    padded = np.zeros(capacity, np.int64)
    padded[:count] = positions
    ids = np.full(capacity, IGNORE_INDEX, np.int64)
    ids[:count] = next_ids[positions]
    return Targets(positions=torch.from_numpy(padded), ids=torch.from_numpy(ids), count=count)
