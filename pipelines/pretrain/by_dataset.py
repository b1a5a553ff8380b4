"""Which dataset each target is from, so that losses are told by dataset and modality.

Enters: the numbers of datasets that a loader gives with its rows. Leaves: counts and sums [datasets, modalities]. Always
holds: several versions of a dataset, and a dataset that several stages name, are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model import MODALITIES, PackedBatch

ByDataset = dict[str, dict[str, float | None]]
"""Mean losses by name and modality; None where there is no target."""


class Datasets:
    """The datasets of a run, by name."""

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:
            names: by number in the batches; the same name may come up again.
        """
        self.names = list(dict.fromkeys(names))
        self._merged = torch.tensor([self.names.index(name) for name in names], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def of_rows(self, sources: Tensor) -> Tensor:
        """int64 [B]: index in `names` of each row, on the host.

        Args:
            sources: of a `StepBatch`.
        """
        return self._merged[sources]

    def counts(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """int64 [datasets, modalities] on the host: targets of a batch.

        Args:
            batch: on the host.
            rows: `of_rows`.
        """
        T = batch.token_ids.shape[1]
        counted = [
            torch.bincount(rows[target.positions[: target.count] // T], minlength=len(self))
            for target in (batch.targets[name] for name in MODALITIES)
        ]
        return torch.stack(counted, dim=1)

    def means(self, sums: Sequence[Sequence[float]], counts: Sequence[Sequence[float]]) -> ByDataset:
        """Mean losses of those that have a target."""
        return {
            name: {m: total / n if n else None for m, total, n in zip(MODALITIES, row, numbers, strict=True)}
            for name, row, numbers in zip(self.names, sums, counts, strict=True)
            if any(numbers)
        }
