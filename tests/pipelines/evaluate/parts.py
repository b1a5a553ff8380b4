"""A tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.sequence import Modality, Vocabulary

CONTEXT = 200


def make_model(vocabulary: Vocabulary, **changes: Any) -> UnifiedTransformer:
    sizes = {f"{m.label}_vocab_size": max(1, vocabulary.size(m)) for m in Modality}
    settings = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "device": "cpu"}
    config = UnifiedTransformerConfig(**(sizes | settings | {"max_sequence_length": CONTEXT} | changes))
    return UnifiedTransformer(replace(config, initializer_std=0.3), seed=1)
