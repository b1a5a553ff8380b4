"""A decoder-only transformer that reads and writes text, images and audio as one token sequence.

Pure PyTorch. See `model.transformer` for the whole, `model.block` for its layers, `model.attention` for the kernels,
`model.batch` for what it trains on, and `python -m model` for the reference example.
"""

from model.attention import AttentionBackendError
from model.batch import IGNORE_INDEX, BatchError, PackedBatch, Targets
from model.block import CausalSelfAttention, FeedForward, TransformerBlock
from model.cache import CacheError, KeyValueCache
from model.config import MODALITIES, ConfigError, UnifiedTransformerConfig
from model.fused import BlockBackendError
from model.loss import LossOutput
from model.rope import RotaryPositionalEmbeddings
from model.transformer import TokenError, UnifiedTransformer

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
    "TransformerBlock",
    "UnifiedTransformer",
    "UnifiedTransformerConfig",
]
