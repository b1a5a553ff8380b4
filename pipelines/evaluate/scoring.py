"""What a model says of each token of whole documents.

Enters: documents as token sequences. Leaves: `Scores`, one entry a token. Always holds: a token's loss is the one that
validation counts: it depends on the tokens before it in its piece, and not on the documents it is packed with.

Shapes: T tokens of a document, B rows of L tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from model import UnifiedTransformer
from pipelines.evaluate.documents import Document
from pipelines.evaluate.errors import EvaluateError
from pipelines.generate.decoding import Watcher
from pipelines.interleave import Sequence
from pipelines.loading.batch import pack
from pipelines.loading.packing import best_fit
from pipelines.loading.windows import NO_TARGET, Rows
from pipelines.sequence import Modality

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens that the model reads at once, by device."""

CHUNK_TOKENS = 1 << 17
"""Tokens of the documents that are packed together."""

Floats = NDArray[np.float32]

Piece = tuple[int, int, int]
"""Index of a sequence, and where a piece of it begins and ends."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of each token of a document, [T]; the first, `<|document|>`, is predicted by nobody and has a loss of 0."""

    losses: Floats
    """Negative log likelihood in nats."""
    ranks: NDArray[np.int64]
    """How many tokens of the same modality the model held for likelier."""
    confidences: Floats
    """Probability of the likeliest token."""


class Scorer:
    """Scores sequences with one model, packed into rows as in training."""

    def __init__(self, model: UnifiedTransformer, padding_id: int, *, name: str = "the model") -> None:
        """
        Args:
            padding_id: a text token that fills rows up.
            name: what errors call the model.
        """
        self._model = model
        self._name = name
        self._padding_id = padding_id
        self._device = model.modality_embedding.weight.device
        self._length = model.config.max_sequence_length
        self._rows = max(1, BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cuda"]) // self._length)

    def documents(
        self, documents: Iterable[Document], watcher: Watcher | None = None
    ) -> Iterator[tuple[Document, Scores]]:
        """Score documents one after the other, holding some of them at a time."""
        for chunk in _chunks(documents):
            cut = [(document.sequence, document.bounds) for document in chunk]
            yield from zip(chunk, self.score(cut, watcher), strict=True)

    @torch.inference_mode()
    def score(self, sequences: Many[tuple[Sequence, tuple[int, ...]]], watcher: Watcher | None = None) -> list[Scores]:
        """Score sequences.

        Args:
            sequences: each with the bounds of its pieces, none longer than the model's context; the first token of a
                piece is predicted by the last one of the piece before it.

        Raises:
            EvaluateError: the model computes what is no number.
        """
        sizes = np.array([len(sequence.token_ids) for sequence, _ in sequences], np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        losses, confidences = (np.zeros(sizes.sum(), np.float32) for _ in range(2))
        ranks = np.zeros(sizes.sum(), np.int64)
        pieces = [(i, a, b) for i, (_, bounds) in enumerate(sequences) for a, b in pairwise(bounds)]
        for batch in self._packed(pieces):
            rows, token = self._lay_out(batch, [sequence for sequence, _ in sequences], starts)
            packed = pack(rows, max(map(len, batch)), target_sizes=32)
            scored = self._model.token_scores(packed.to(self._device))
            for modality in Modality:
                targets, found = packed.targets[modality.label], scored[modality.label]
                where = token[targets.positions[: targets.count].numpy()]
                losses[where] = found.losses[: targets.count].cpu().numpy()
                ranks[where] = found.ranks[: targets.count].cpu().numpy()
                confidences[where] = found.confidences[: targets.count].float().cpu().numpy()
            if watcher is not None:
                watcher.advanced(sum(stop - start for row in batch for _, start, stop in row))
        if not np.isfinite(losses).all():
            raise EvaluateError(
                f"{self._name}: the model computes NaN or infinity; its training diverged; use an earlier checkpoint"
            )
        parts = [slice(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        return [Scores(losses[part], ranks[part], confidences[part]) for part in parts]

    def _packed(self, pieces: Many[Piece]) -> Iterator[list[list[Piece]]]:
        """Rows of pieces, so many at a time."""
        lengths = np.array([stop - start for _, start, stop in pieces])
        if len(lengths) and lengths.max() > self._length:
            raise EvaluateError(
                f"{self._name}: a sequence of {lengths.max():,} tokens, over its context of {self._length:,} "
                "(max_sequence_length)"
            )
        row = best_fit(lengths, self._length, self._length)
        rows: list[list[Piece]] = [[] for _ in range(int(row.max(initial=-1)) + 1)]
        for number, piece in zip(row.tolist(), pieces, strict=True):
            rows[number].append(piece)
        for at in range(0, len(rows), self._rows):
            yield rows[at : at + self._rows]

    def _lay_out(
        self, batch: list[list[Piece]], sequences: Many[Sequence], starts: NDArray[np.int64]
    ) -> tuple[Rows, NDArray[np.int64]]:
        """The rows, and for each of their B*L positions which token of all sequences is predicted there."""
        rows = Rows.allocate(len(batch), self._length)
        token = np.full((len(batch), self._length), -1, np.int64)
        for b, row in enumerate(batch):
            at = 0
            for number, start, stop in row:
                ids, kinds = sequences[number].token_ids, sequences[number].modality_ids
                here = slice(at, at + stop - start)
                rows.token_ids[b, here], rows.modality_ids[b, here] = ids[start:stop], kinds[start:stop]
                rows.positions[b, here] = np.arange(stop - start)
                token[b, here] = starts[number] + np.arange(start + 1, stop + 1)
                inside = min(stop, len(ids) - 1) - start
                rows.next_ids[b, at : at + inside] = ids[start + 1 : start + 1 + inside]
                rows.next_modality_ids[b, at : at + inside] = kinds[start + 1 : start + 1 + inside]
                if stop == len(ids):
                    rows.next_ids[b, here.stop - 1] = self._padding_id
                    rows.next_modality_ids[b, here.stop - 1] = NO_TARGET
                at = here.stop
            if at < self._length:
                rows.pad(b, self._padding_id, at)
        return rows, token.reshape(-1)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    tokens = 0
    for document in documents:
        chunk.append(document)
        tokens += len(document.sequence.token_ids)
        if tokens >= CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk
