"""Validation loss by modality, and for audio by codebook.

Enters: a loader over the validation split. Leaves: a `CrossEntropy`. Always holds: the same targets every time, the same
result for any number of ranks, and a rank without any target takes part all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import PackedBatch, UnifiedTransformer
from pipelines.loading import StepBatch
from pipelines.pretrain.by_dataset import ByDataset, Datasets
from pipelines.pretrain.parallelize import Ranks
from pipelines.sequence import Modality, Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Mean negative log likelihood in nats by modality; None where there is no target."""

    text: float | None
    image: float | None
    audio: float | None
    audio_codebooks: tuple[float | None, ...]

    @classmethod
    def of(cls, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> CrossEntropy:
        """From sums and counts of [text, image, audio codebook 0, audio codebook 1, ...]."""
        means = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
        audio = int(counts[2:].sum())
        return cls(
            text=means[0],
            image=means[1],
            audio=float(sums[2:].sum() / audio) if audio else None,
            audio_codebooks=tuple(means[2:]),
        )

    def items(self) -> list[tuple[str, float]]:
        """(name, value) of all there are: text, image, audio, audio/0, audio/1, ..."""
        named = [("text", self.text), ("image", self.image), ("audio", self.audio)]
        named += [(f"audio/{q}", value) for q, value in enumerate(self.audio_codebooks)]
        return [(name, value) for name, value in named if value is not None]

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "image": self.image,
            "audio": self.audio,
            "audio_codebooks": list(self.audio_codebooks),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CrossEntropy:
        return cls(
            text=values["text"],
            image=values["image"],
            audio=values["audio"],
            audio_codebooks=tuple(values["audio_codebooks"]),
        )


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How often each token is a target."""

    text: NDArray[np.int64]
    """[text_vocab_size]."""
    image: NDArray[np.int64]
    """[image_codebook_size]."""
    audio: NDArray[np.int64]
    """[K, audio_codebook_size]."""

    def groups(self) -> list[NDArray[np.int64]]:
        """[text, image, audio codebook 0, audio codebook 1, ...]."""
        return [self.text, self.image, *self.audio]


class Validator:
    """Holds a rank's validation batches in memory and evaluates a model on them."""

    def __init__(
        self, steps: Iterable[StepBatch], vocabulary: Vocabulary, ranks: Ranks, names: Sequence[str] = ("data",)
    ) -> None:
        """
        Args:
            names: of the datasets, by their numbers in the batches; the same name may come up again.
        """
        held = [pair for step in steps for pair in zip(step.micro_batches, step.sources, strict=True)]
        self._batches = [batch for batch, _ in held]
        self._vocabulary = vocabulary
        self._ranks = ranks
        datasets = Datasets(names)
        self._names = datasets.names
        rows = [datasets.of_rows(sources) for _, sources in held]
        self._datasets = [row.to(ranks.device) for row in rows]
        """Of each row of each batch."""
        self.counts = self._count()
        """Of the targets of all ranks."""
        counted = (datasets.counts(batch, row) for batch, row in zip(self._batches, rows, strict=True))
        none = torch.zeros(len(datasets), len(Modality), dtype=torch.int64)
        self._dataset_counts = ranks.sum(sum(counted, none).to(ranks.device))
        self.by_dataset: ByDataset = {}
        """What the last evaluation came to for each dataset and modality."""

    @property
    def targets(self) -> int:
        """Targets of all ranks; 0 means that there is nothing to validate on."""
        return sum(int(group.sum()) for group in self.counts.groups())

    def evaluate(self, model: UnifiedTransformer) -> CrossEntropy:
        """Loss of the model over all validation targets. Every rank must call it."""
        groups = self.counts.groups()
        sums = torch.zeros(len(groups), dtype=torch.float64, device=self._ranks.device)
        all_losses = []
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in self._batches:
                here = batch.to(self._ranks.device, non_blocking=True)
                losses = model.token_losses(here)
                all_losses.append(losses)
                for modality in Modality:
                    sums.index_add_(0, self._group(here, modality), losses[modality.label].double())
        model.train(training)
        totals = self._ranks.sum(sums).cpu().numpy()
        means = (self._ranks.sum(self._by_dataset(all_losses)) / self._dataset_counts).tolist()
        self.by_dataset = {
            name: {m.label: value if value == value else None for m, value in zip(Modality, row, strict=True)}
            for name, row in zip(self._names, means, strict=True)
        }
        return CrossEntropy.of(totals, np.array([group.sum() for group in groups]))

    def _by_dataset(self, losses: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """float64 [datasets, modalities]: the sums of losses of this rank's targets."""
        sums = torch.zeros(len(self._names), len(Modality), dtype=torch.float64, device=self._ranks.device)
        for number, (batch, datasets) in enumerate(zip(self._batches, self._datasets, strict=True)):
            for modality in Modality:
                targets = batch.targets[modality.label]
                rows = targets.positions[: targets.count].to(self._ranks.device) // batch.token_ids.shape[1]
                values = losses[number][modality.label][: targets.count].double()
                sums[:, modality].index_add_(0, datasets[rows], values)
        return sums

    def _group(self, batch: PackedBatch, modality: Modality) -> torch.Tensor:
        """Index of each target's group. Padded slots, whose loss is 0, fall anywhere."""
        ids = batch.targets[modality.label].ids
        if modality is Modality.AUDIO and self._vocabulary.audio_codebooks:
            return 2 + ids.clamp(min=0) // self._vocabulary.audio_codebook_size
        return torch.full_like(ids, min(modality, 1))

    def _count(self) -> TokenCounts:
        v = self._vocabulary
        counted = []
        for modality in Modality:
            counts = torch.zeros(v.size(modality), dtype=torch.int64)
            for batch in self._batches:
                targets = batch.targets[modality.label]
                counts += torch.bincount(targets.ids[: targets.count], minlength=len(counts))
            counted.append(self._ranks.sum(counts.to(self._ranks.device)).cpu().numpy())
        return TokenCounts(counted[0], counted[1], counted[2].reshape(v.audio_codebooks, v.audio_codebook_size))
