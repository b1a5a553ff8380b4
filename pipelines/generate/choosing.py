"""From hidden states to the next id of every row.

Enters: hidden states, what may stand there, a draw a row. Leaves: ids. Always holds: logits are computed of no id that may
not stand there. Guidance comes first, then the repetition penalty, then the order of `pipelines.generate.sampling`.

Shapes: B rows, D hidden, V ids that may stand at a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model import UnifiedTransformer
from pipelines.generate.continuation import Continuation
from pipelines.generate.request import Request
from pipelines.generate.sampling import penalize, sample
from pipelines.sequence import Allowed, Modality


class Chooser:
    """Chooses for a batch, and remembers what its rows hold where a penalty asks for it."""

    def __init__(self, model: UnifiedTransformer, rows: Sequence[Continuation], request: Request) -> None:
        self._model = model
        self._request = request
        self._rows = len(rows)
        v = rows[0].grammar.vocabulary
        # Special tokens may be repeated: a document needs them.
        self._sizes = {m: v.text_pieces if m is Modality.TEXT else v.size(m) for m in Modality}
        device = model.modality_embedding.weight.device
        self._seen: dict[Modality, Tensor] = {
            m: torch.zeros(len(rows), self._sizes[m], dtype=torch.bool, device=device)
            for m in Modality
            if request.sampling_of(m).repetition_penalty != 1 and self._sizes[m]
        }
        """bool [B, ids] by modality."""
        for b, row in enumerate(rows):
            for m, seen in self._seen.items():
                held = [i for i, kind in zip(row.token_ids, row.modality_ids, strict=True) if kind == m]
                seen[b, [i for i in held if i < self._sizes[m]]] = True

    def choose(
        self, hidden: Tensor, allowed: Allowed, uniforms: Tensor, members: Sequence[int] | None = None
    ) -> Tensor:
        """The next ids.

        Args:
            hidden: [B, D]; with guidance [2B, D], the second half without the prompts.
            uniforms: float64, one draw a chosen row.
            members: the rows to choose for; all by default.

        Returns:
            int64 [members].
        """
        sampling = self._request.sampling_of(allowed.modality)
        inside = list(range(self._rows)) if members is None else list(members)
        logits = self._logits(hidden[: self._rows] if members is None else hidden[inside], allowed)
        if sampling.guidance != 1:
            shadows = hidden[self._rows :] if members is None else hidden[[self._rows + b for b in inside]]
            without = self._logits(shadows, allowed).float()
            logits = without + sampling.guidance * (logits.float() - without)
        if (seen := self._seen.get(allowed.modality)) is not None:
            logits = penalize(logits, self._held(seen[inside], allowed), sampling.repetition_penalty)
        index = sample(logits, sampling, uniforms)
        ids, offset = index, 0
        for low, high in allowed.ranges:
            ids = index + (low - offset) if offset == 0 else torch.where(index >= offset, index + (low - offset), ids)
            offset += high - low
        if seen is not None:
            self._remember(seen, inside, ids)
        return ids

    def _logits(self, hidden: Tensor, allowed: Allowed) -> Tensor:
        weight = self._model.head_weight(allowed.modality.label)
        parts = [F.linear(hidden, weight[low:high]) for low, high in allowed.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _held(self, seen: Tensor, allowed: Allowed) -> Tensor:
        """Which of the ids that may stand there a row holds already, bool [members, V]."""
        size = self._sizes[allowed.modality]
        # Ids behind `size` are special tokens, which are never counted as held.
        parts = [
            F.pad(seen[:, low : min(high, size)], (0, high - max(low, min(high, size)))) for low, high in allowed.ranges
        ]
        return torch.cat(parts, dim=-1)

    def _remember(self, seen: Tensor, members: Sequence[int], ids: Tensor) -> None:
        rows = torch.tensor(members, device=ids.device)
        # Without looking at the ids, which would wait for the device: a special token marks nothing new.
        inside = ids < seen.shape[1]
        seen[rows, ids.clamp(max=seen.shape[1] - 1)] |= inside
