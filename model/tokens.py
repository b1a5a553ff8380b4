"""What may be a token: ids of one modality's vocabulary, each beside its modality id.

Enters: token ids and modality ids. Leaves: nothing, or a `TokenError`. Always holds: shapes and types are looked at without
waiting for a device, values only when asked to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import MODALITIES


class TokenError(ValueError):
    """Token or modality ids of a wrong shape, type or range; the message names the place, the value and what may be."""


def require_ids(token_ids: Tensor, modality_ids: Tensor) -> None:
    """Refuse, without looking at any value, what cannot be ids [B, T]."""
    if token_ids.ndim != 2 or token_ids.shape != modality_ids.shape:
        raise TokenError(
            f"token_ids is {tuple(token_ids.shape)} and modality_ids {tuple(modality_ids.shape)}: both must be [B, T], "
            "of one shape"
        )
    for name, ids in (("token_ids", token_ids), ("modality_ids", modality_ids)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TokenError(
                f"{name} is {str(ids.dtype).removeprefix('torch.')}: ids are integers; convert it with .long()"
            )


def check_ids(token_ids: Tensor, modality_ids: Tensor, vocab_sizes: Mapping[str, int]) -> None:
    """Refuse ids out of range; it reads every value.

    Raises:
        TokenError: naming the first offending id and where it is.
    """
    sizes = torch.tensor(list(vocab_sizes.values()), device=token_ids.device)
    token_ids, modality_ids = token_ids.long(), modality_ids.long()
    unknown = (modality_ids < 0) | (modality_ids >= len(MODALITIES))
    if bool(unknown.any()):
        b, t = unknown.nonzero()[0].tolist()
        raise TokenError(
            f"modality_ids[{b}, {t}] is {int(modality_ids[b, t])}: the modalities are "
            + ", ".join(f"{index} ({name})" for index, name in enumerate(MODALITIES))
        )
    outside = (token_ids < 0) | (token_ids >= sizes[modality_ids])
    if bool(outside.any()):
        b, t = outside.nonzero()[0].tolist()
        name = MODALITIES[int(modality_ids[b, t])]
        raise TokenError(
            f"token_ids[{b}, {t}] is {int(token_ids[b, t])}: {name} ids lie in "
            f"0..{vocab_sizes[name] - 1}; check its modality, or that data and model share one "
            f"vocabulary ({name}_vocab_size)"
        )
