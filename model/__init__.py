"""A decoder-only transformer that reads and writes text, images and audio as one token sequence.

Pure PyTorch. See `model.transformer` for the whole, `model.block` for its layers, `model.attention` for the kernels,
`model.batch` for what it trains on, and `python -m model` for the reference example.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.attention import AttentionBackendError
    from model.batch import IGNORE_INDEX, BatchError, PackedBatch, Targets
    from model.block import CausalSelfAttention, FeedForward, TransformerBlock
    from model.cache import CacheError, KeyValueCache
    from model.config import MODALITIES, ConfigError, UnifiedTransformerConfig
    from model.fused import BlockBackendError
    from model.loss import LossOutput, TokenScores
    from model.rope import RotaryPositionalEmbeddings
    from model.tokens import TokenError
    from model.transformer import UnifiedTransformer

__all__ = [
    "IGNORE_INDEX",
    "MODALITIES",
    "AttentionBackendError",
    "BatchError",
    "BlockBackendError",
    "CacheError",
    "CausalSelfAttention",
    "ConfigError",
    "FeedForward",
    "KeyValueCache",
    "LossOutput",
    "PackedBatch",
    "RotaryPositionalEmbeddings",
    "Targets",
    "TokenError",
    "TokenScores",
    "TransformerBlock",
    "UnifiedTransformer",
    "UnifiedTransformerConfig",
]

_HOMES = {
    "IGNORE_INDEX": "batch",
    "MODALITIES": "config",
    "AttentionBackendError": "attention",
    "BatchError": "batch",
    "BlockBackendError": "fused",
    "CacheError": "cache",
    "CausalSelfAttention": "block",
    "ConfigError": "config",
    "FeedForward": "block",
    "KeyValueCache": "cache",
    "LossOutput": "loss",
    "TokenScores": "loss",
    "PackedBatch": "batch",
    "RotaryPositionalEmbeddings": "rope",
    "Targets": "batch",
    "TokenError": "tokens",
    "TransformerBlock": "block",
    "UnifiedTransformer": "transformer",
    "UnifiedTransformerConfig": "config",
}
"""The module of each name. It is imported when the name is first asked for: a recipe that is read only to be submitted needs
the configuration, and not the second that torch takes."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
