"""The workload that training is measured on, made by rule: packed documents of three modalities.

Document lengths are log-uniform in 256..4096 tokens; half of a document's tokens are text, 35% image, 15% audio. Documents
are packed whole into rows, best fit first, and what is left of a row is padding, which counts as no token.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch

from model import IGNORE_INDEX, MODALITIES, PackedBatch, Targets, UnifiedTransformerConfig

SHARES = {"text": 0.5, "image": 0.35, "audio": 0.15}
_WINDOW_ROWS = 1024
TARGET_SIZES = 64
"""As `data.target_sizes` of a recipe: targets are padded to multiples of a 64th of a micro-batch."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of one rank, as `pipelines.loading.StepBatch` gives it."""

    micro_batches: list[PackedBatch]
    tokens: int
    """Not counting padding."""

    @property
    def sources(self) -> list[torch.Tensor]:
        """All rows are from one dataset, number 0."""
        return [torch.zeros(len(batch.token_ids), dtype=torch.int64) for batch in self.micro_batches]


def document_lengths(rng: np.random.Generator, tokens: int, shortest: int, longest: int) -> list[int]:
    """Log-uniform lengths of about so many tokens in all."""
    lengths: list[int] = []
    total = 0
    while total < tokens:
        lengths.append(int(np.exp(rng.uniform(np.log(shortest), np.log(longest + 1)))))
        total += lengths[-1]
    return lengths


def pack(lengths: list[int], length: int) -> list[list[int]]:
    """Rows of documents: best-fit decreasing."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for document in sorted(lengths, reverse=True):
        at = bisect.bisect_left(room, (document, -1))
        left, index = room.pop(at) if at < len(room) else (length, len(rows))
        if index == len(rows):
            rows.append([])
        rows[index].append(document)
        bisect.insort(room, (left - document, index))
    return rows


def make_steps(
    config: UnifiedTransformerConfig,
    *,
    steps: int,
    sequences: int,
    micro_batch: int,
    length: int,
    seed: int = 0,
    longest: int | None = None,
    pin: bool = False,
) -> list[Step]:
    """Steps of `sequences` rows in micro-batches of `micro_batch` rows; the last may hold fewer."""
    rng = np.random.default_rng(seed)
    longest = longest or length
    # More than is needed, so that the rows taken are as full as those of a long run, which packs 16 M tokens
    # together.
    lengths = document_lengths(rng, max(steps * sequences, _WINDOW_ROWS) * length, longest // 16, longest)
    rows = pack(lengths, length)
    rows = [rows[i] for i in rng.permutation(len(rows))[: steps * sequences]]
    made = []
    for step in range(steps):
        mine = rows[step * sequences : (step + 1) * sequences]
        batches = [_batch(config, mine[i : i + micro_batch], length, rng) for i in range(0, len(mine), micro_batch)]
        if pin:
            batches = [batch.pin_memory() for batch in batches]
        made.append(Step(batches, sum(map(sum, mine))))
    return made


def executed_flops(config: UnifiedTransformerConfig, step: Step) -> float:
    """Floating-point operations that a step really takes, padding included: attention inside documents only, causal, and each
    head at its targets only."""
    D, L = config.hidden_size, config.num_layers
    total = attention_flops(config, step)
    for batch in step.micro_batches:
        total += 6 * batch.token_ids.numel() * L * (4 * D * D + 2 * D * config.ffn_hidden_size)
        total += 6 * D * sum(len(batch.targets[name].ids) * config.vocab_sizes[name] for name in MODALITIES)
    return total


def attention_flops(config: UnifiedTransformerConfig, step: Step) -> float:
    """Of these, those of attention: queries and keys of one document, causal."""
    pairs = sum(float((batch.cu_seqlens.double().diff() ** 2).sum()) for batch in step.micro_batches)
    return 6 * config.num_layers * config.hidden_size * pairs


def _batch(
    config: UnifiedTransformerConfig, rows: list[list[int]], length: int, rng: np.random.Generator
) -> PackedBatch:
    modality_ids = np.zeros((len(rows), length), np.int64)
    for b, row in enumerate(rows):
        at = 0
        for document in row:
            text = round(document * SHARES["text"])
            image = round(document * SHARES["image"])
            modality_ids[b, at + text : at + text + image] = 1
            modality_ids[b, at + text + image : at + document] = 2
            at += document
    sizes = np.array([config.vocab_sizes[name] for name in MODALITIES])
    return packed_batch(_tokens(modality_ids, sizes, rng), modality_ids, rows)


def packed_batch(token_ids: np.ndarray, modality_ids: np.ndarray, rows: list[list[int]]) -> PackedBatch:
    """A batch of documents that lie one after the other in each row.

    Args:
        token_ids: int64 [B, T].
        modality_ids: int64 [B, T].
        rows: lengths of the documents of each row; what is left of it is padding.
    """
    B, length = token_ids.shape
    positions = np.zeros((B, length), np.int64)
    # 1 where the token is followed by another one of its document.
    followed = np.zeros((B, length), bool)
    starts: list[int] = []
    for b, row in enumerate(rows):
        at = 0
        for document in row:
            positions[b, at : at + document] = np.arange(document)
            followed[b, at : at + document - 1] = True
            starts.append(b * length + at)
            at += document
        if at < length:
            positions[b, at:] = np.arange(length - at)
            starts.append(b * length + at)
    cu_seqlens = np.full(B * (length // 256 + 2) + 1, B * length, np.int32) if length >= 256 else None
    if cu_seqlens is None or len(starts) >= len(cu_seqlens):
        cu_seqlens = np.full(len(starts) + 1, B * length, np.int32)
    cu_seqlens[: len(starts)] = starts
    flat_ids, flat_modalities = token_ids.reshape(-1), modality_ids.reshape(-1)
    predicting = np.flatnonzero(followed.reshape(-1))
    unit = max(1, B * length // TARGET_SIZES)
    targets = {}
    for modality, name in enumerate(MODALITIES):
        where = predicting[flat_modalities[predicting + 1] == modality]
        capacity = max(1, -(-len(where) // unit)) * unit
        padded, ids = np.zeros(capacity, np.int64), np.full(capacity, IGNORE_INDEX, np.int64)
        padded[: len(where)], ids[: len(where)] = where, flat_ids[where + 1]
        targets[name] = Targets(positions=torch.from_numpy(padded), ids=torch.from_numpy(ids), count=len(where))
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids),
        modality_ids=torch.from_numpy(modality_ids),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=length,
        targets=targets,
    )


def _tokens(modality_ids: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ids with something to learn: half of them follow from the id before by a fixed rule, the others are drawn by Zipf."""
    V = sizes[modality_ids]
    drawn = np.minimum(rng.zipf(1.3, size=modality_ids.shape) - 1, V - 1)
    ids = drawn.copy()
    by_rule = rng.random(modality_ids.shape) < 0.5
    for t in range(1, ids.shape[1]):
        follows = by_rule[:, t] & (modality_ids[:, t] == modality_ids[:, t - 1])
        ids[:, t] = np.where(follows, (ids[:, t - 1] * 7 + 3) % np.minimum(V[:, t], 997), drawn[:, t])
    return ids.astype(np.int64)
