"""Small configurations and random packs for the model's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from model import UnifiedTransformerConfig

SIZES = (31, 23, 17)


def tiny_config(**changes: object) -> UnifiedTransformerConfig:
    settings: dict[str, object] = {
        "text_vocab_size": SIZES[0],
        "image_vocab_size": SIZES[1],
        "audio_vocab_size": SIZES[2],
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "max_sequence_length": 64,
        "device": "cpu",
    }
    return UnifiedTransformerConfig(**(settings | changes))  # type: ignore[arg-type]


def random_document(
    length: int, generator: torch.Generator, modalities: tuple[int, ...] = (0, 1, 2)
) -> tuple[Tensor, Tensor]:
    """Token ids and modality ids of one document, every id inside its own vocabulary."""
    kinds = torch.tensor(modalities)[torch.randint(len(modalities), (length,), generator=generator)]
    ids = (torch.rand(length, generator=generator) * torch.tensor(SIZES)[kinds]).long()
    return ids, kinds


def random_rows(
    lengths: list[list[int]], seed: int = 0, modalities: tuple[int, ...] = (0, 1, 2)
) -> list[list[tuple[Tensor, Tensor]]]:
    """Rows of documents with the given lengths, for `PackedBatch.from_sequences`."""
    generator = torch.Generator().manual_seed(seed)
    return [[random_document(length, generator, modalities) for length in row] for row in lengths]


def random_starts(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """`PackedBatch.cu_seqlens` of full rows of up to six documents, and one of a single token; with room for three more."""
    starts = [0, 1]
    for row in range(rows):
        cuts = torch.randperm(length - 2, generator=generator)[: int(torch.randint(6, (), generator=generator))] + 2
        starts += [row * length + cut for cut in (*sorted(cuts.tolist()), length)]
    return torch.tensor(starts + [rows * length] * 3, dtype=torch.int32)
