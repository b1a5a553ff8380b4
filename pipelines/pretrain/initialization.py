"""What the initial weights know of the audio vocabulary: which ids belong to one codebook.

`model.initialization` draws every embedding alone, so a model would have to learn for each of K x codebook_size ids to
which codebook it belongs before it can know whose turn is next: thousands of facts, each seen as seldom as its id.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model import UnifiedTransformer
from pipelines.sequence import Vocabulary

_SEED_OFFSET = 0x61756469
"""Keeps these draws apart from those of `model.initialization`."""


@torch.no_grad()
def share_codebook_directions(model: UnifiedTransformer, vocabulary: Vocabulary, seed: int) -> None:
    """Give the audio ids of each codebook a random direction in common, in the embedding and in the head.

    The direction is as long as the part of its own that each id has, so the logits keep their order of magnitude.
    The same for any number of ranks.
    """
    K, size = vocabulary.audio_codebooks, vocabulary.audio_codebook_size
    if K < 2:
        return
    generator = torch.Generator().manual_seed(seed + _SEED_OFFSET)
    for weight in (model.embeddings["audio"].get_parameter("weight"), model.heads["audio"].get_parameter("weight")):
        own = weight.float().square().mean().sqrt()
        length = float(own.full_tensor() if isinstance(own, DTensor) else own)
        shared = torch.randn(K, weight.shape[1], generator=generator) * length
        weight.add_(_like(shared.repeat_interleave(size, dim=0), weight))


def _like(values: Tensor, weight: Tensor) -> Tensor:
    values = values.to(weight.device, weight.dtype)
    if isinstance(weight, DTensor):
        return distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)
    return values
