"""The batch that training runs on: documents packed into rows, and where each head has something to predict.

Shapes: B rows, T tokens a row, C capacity of one modality's targets. All shapes are fixed by the loader's settings and
all counts are host integers, so a training step needs no synchronisation with the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.config import MODALITIES

IGNORE_INDEX = -100
"""Target id of a padded target slot, as in `torch.nn.functional.cross_entropy`."""


class BatchError(ValueError):
    """A batch breaks its contract; the message names the place, the value and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What one modality's head predicts in a batch."""

    positions: Tensor
    """int64 [C]: index into the flattened B*T of the hidden state that predicts; 0 in padded slots."""
    ids: Tensor
    """int64 [C]: the token to predict, local to the modality's vocabulary; `IGNORE_INDEX` in padded slots."""
    count: int
    """Number of valid targets; they come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Documents packed into B rows of T tokens. No document crosses from one row into the next."""

    token_ids: Tensor
    """int32 or int64 [B, T], local to each token's modality."""
    modality_ids: Tensor
    """any integer type [B, T]: 0 text, 1 image, 2 audio."""
    positions: Tensor
    """int32 or int64 [B, T]: index of each token in its document."""
    cu_seqlens: Tensor
    """int32 [max_documents + 1]: where documents begin in the flattened B*T, ascending from 0, then B*T repeated.
    Together they cover every token: the padding at the end of a row is a document of its own, without targets."""
    max_seqlen: int
    """No document is longer. A constant (such as T) spares compiled code from compiling again."""
    targets: Mapping[str, Targets]
    """By modality name: "text", "image", "audio", all three always present, a modality without targets included."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; `torch.utils.data.DataLoader(pin_memory=True)` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> PackedBatch:
        return PackedBatch(
            token_ids=f(self.token_ids),
            modality_ids=f(self.modality_ids),
            positions=f(self.positions),
            cu_seqlens=f(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            targets={
                name: Targets(positions=f(target.positions), ids=f(target.ids), count=target.count)
                for name, target in self.targets.items()
            },
        )

    def check(self) -> None:
        """Verify the contract. It reads every value, so call it on the CPU, in tests and before a first step.

        Raises:
            BatchError: something in the batch contradicts the description of its fields.
        """
        B, T = _shape(self.token_ids)
        for name in ("modality_ids", "positions"):
            if getattr(self, name).shape != (B, T):
                raise BatchError(f"{name} has shape {tuple(getattr(self, name).shape)}: token_ids has {(B, T)}")
        starts = self.cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        if self.cu_seqlens.dtype != torch.int32 or len(starts) < 2 or starts[0] != 0 or starts[-1] != B * T:
            raise BatchError(f"cu_seqlens must be int32 from 0 to {B * T}, and is {self.cu_seqlens}")
        for start, length in zip(starts, lengths, strict=False):
            if length < 0:
                raise BatchError(f"cu_seqlens descends after {start}: document starts must ascend")
            if length and start // T != (start + length - 1) // T:
                raise BatchError(f"the document at {start} of {length} tokens crosses the end of a row of {T}")
        if max(lengths) > self.max_seqlen:
            raise BatchError(f"max_seqlen is {self.max_seqlen}, but a document has {max(lengths)} tokens")
        if set(self.targets) != set(MODALITIES):
            raise BatchError(
                f"targets are given for {sorted(self.targets)}: give {', '.join(MODALITIES)}, empty or not"
            )
        for name, target in self.targets.items():
            valid = target.ids != IGNORE_INDEX
            if target.positions.shape != target.ids.shape or target.ids.dim() != 1:
                raise BatchError(f"targets[{name!r}]: positions and ids must be vectors of one length")
            if int(valid.sum()) != target.count or not bool(valid[: target.count].all()):
                raise BatchError(
                    f"targets[{name!r}].count is {target.count}: it must count the valid ids, which come first"
                )
            if target.positions.numel() and not 0 <= int(target.positions.min()) <= int(target.positions.max()) < B * T:
                raise BatchError(f"targets[{name!r}].positions leave the range 0..{B * T - 1}")

    @classmethod
    def from_sequences(
        cls,
        rows: Sequence[Sequence[tuple[Tensor, Tensor]]],
        *,
        length: int | None = None,
        capacity: int | Mapping[str, int] | None = None,
        max_documents: int | None = None,
    ) -> PackedBatch:
        """Pack documents into rows as given, with next-token targets inside each document.

        The token at t + 1 of a document is predicted at t by the head of the modality of token t + 1; the first token
        of a document is nobody's target. For an unpacked [B, T] input see `from_tensors`. Simple rather than fast.

        Args:
            rows: for each row its documents, each a pair (token_ids, modality_ids) of integer vectors of one length.
            length: T; by default that of the longest row. Shorter rows are padded at the end.
            capacity: slots for targets, for all modalities or by name; by default as many as there are targets.
            max_documents: documents, padding included, that `cu_seqlens` has room for; by default as many as there are.

        Raises:
            BatchError: a row is longer than `length`, or there are more targets or documents than room.
        """
        T = length if length is not None else max(sum(len(ids) for ids, _ in row) for row in rows)
        token_ids = torch.zeros(len(rows), T, dtype=torch.int64)
        modality_ids = torch.zeros(len(rows), T, dtype=torch.int64)
        positions = torch.zeros(len(rows), T, dtype=torch.int64)
        starts = [0]
        predicted: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in MODALITIES}
        for b, row in enumerate(rows):
            at = 0
            for ids, modalities in row:
                end = at + len(ids)
                if end > T:
                    raise BatchError(f"row {b} holds at least {end} tokens: length is {T}; move a document or raise it")
                token_ids[b, at:end] = ids
                modality_ids[b, at:end] = modalities
                positions[b, at:end] = torch.arange(len(ids))
                for t in range(len(ids) - 1):
                    where, what = predicted[MODALITIES[int(modalities[t + 1])]]
                    where.append(b * T + at + t)
                    what.append(int(ids[t + 1]))
                at = end
                starts.append(b * T + at)
            if at < T:
                positions[b, at:] = torch.arange(T - at)
                starts.append((b + 1) * T)
        room = max_documents if max_documents is not None else len(starts) - 1
        if len(starts) - 1 > room:
            raise BatchError(f"{len(starts) - 1} documents, padding included: max_documents is {room}; raise it")
        lengths = [end - start for start, end in pairwise(starts)]
        capacities = capacity if isinstance(capacity, Mapping) else dict.fromkeys(MODALITIES, capacity)
        return cls(
            token_ids=token_ids,
            modality_ids=modality_ids,
            positions=positions,
            cu_seqlens=torch.tensor(starts + [len(rows) * T] * (room + 1 - len(starts)), dtype=torch.int32),
            max_seqlen=max(lengths),
            targets={name: _padded(name, *predicted[name], capacities.get(name)) for name in MODALITIES},
        )

    @classmethod
    def from_tensors(cls, token_ids: Tensor, modality_ids: Tensor) -> PackedBatch:
        """A batch of unpacked rows: each row of the integer [B, T] tensors is one document."""
        return cls.from_sequences([[pair] for pair in zip(token_ids.cpu(), modality_ids.cpu(), strict=True)])


def _padded(name: str, positions: list[int], ids: list[int], capacity: int | None) -> Targets:
    room = len(ids) if capacity is None else capacity
    if len(ids) > room:
        raise BatchError(f"{len(ids)} {name} targets: the capacity is {room}; raise it, or pack fewer {name} tokens")
    padding = room - len(ids)
    return Targets(
        positions=torch.tensor(positions + [0] * padding, dtype=torch.int64),
        ids=torch.tensor(ids + [IGNORE_INDEX] * padding, dtype=torch.int64),
        count=len(ids),
    )


def _shape(token_ids: Tensor) -> tuple[int, int]:
    if token_ids.dim() != 2:
        raise BatchError(f"token_ids has shape {tuple(token_ids.shape)}: it must be [rows, tokens]")
    return token_ids.shape[0], token_ids.shape[1]
