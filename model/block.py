"""One layer of the transformer: LayerNorm, attention, residual; LayerNorm, feed-forward, residual.

No linear layer and no LayerNorm has a bias (Chowdhery et al., PaLM, 2022, section 2). The blocks are free of
data-dependent Python, so `torch.compile(fullgraph=True)` takes them whole.

Shapes: B batch, T tokens, D hidden, N heads, H head size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionPlan, attend, largest_logit, plan_attention
from model.cache import LayerCache
from model.config import UnifiedTransformerConfig
from model.fused import fused_block
from model.rope import rotate


def _head_norm(config: UnifiedTransformerConfig) -> nn.Module:
    return nn.LayerNorm(config.head_size, config.layer_norm_eps, bias=False) if config.qk_norm else nn.Identity()


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions, over packed documents."""

    def __init__(self, config: UnifiedTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.watching = False
        """Whether to measure the largest logit; see `UnifiedTransformer.attention_peaks`."""
        self.peak: Tensor | None = None
        self.query_norm = _head_norm(config)
        self.key_norm = _head_norm(config)

    def forward(self, x: Tensor, plan: AttentionPlan | None = None, cache: LayerCache | None = None) -> Tensor:
        """Mix each token with the earlier ones of its document.

        Args:
            x: [B, T, D].
            plan: shared by all layers of a forward pass; without one, each row is one document.
            cache: keys and values of earlier tokens; the new ones are added to it.

        Returns:
            [B, T, D].
        """
        if plan is None:
            plan = plan_attention(self.config, x)
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.config.num_attention_heads, self.config.head_size).unbind(2)
        q, k = self.query_norm(q), self.key_norm(k)
        if plan.rotation is not None:
            q, k = rotate(q, *plan.rotation), rotate(k, *plan.rotation)
        # Rotation, and LayerNorm under autocast, come out in float32; the kernels want one type.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.watching:
            self.peak = largest_logit(q, k, plan)
        if cache is not None:
            k, v = cache.update(k, v, plan.positions)
        return self.output(attend(q, k, v, plan).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with GELU between them (Hendrycks and Gimpel, 2016; the exact form)."""

    def __init__(self, config: UnifiedTransformerConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.output = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.output(F.gelu(self.input(x)))


class TransformerBlock(nn.Module):
    """Residual block: x + attention(norm(x)), then x + feed_forward(norm(x)); or with `norm_placement` "reordered"
    x + norm(attention(x)), then x + norm(feed_forward(x))."""

    def __init__(self, config: UnifiedTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, bias=False)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.reordered = config.norm_placement == "reordered"
        self.recompute = "none"
        """What the fused block computes again in the backward pass: "none", "feed_forward" (its hidden layer), "all"."""
        self.keep = "least"
        """What of the rest it keeps: "least", and what norms and GELU put out is made again, or "all"."""
        self.float8 = False
        """Whether the fused block multiplies in float8 (`model.float8`)."""

    def forward(self, x: Tensor, plan: AttentionPlan | None = None, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; the arguments are those of `CausalSelfAttention.forward`."""
        if plan is not None and plan.fused:
            return fused_block(x, plan, self, cache)
        if self.reordered:
            x = x + self.dropout(self.attention_norm(self.attention(x, plan, cache)))
            return x + self.dropout(self.feed_forward_norm(self.feed_forward(x)))
        x = x + self.dropout(self.attention(self.attention_norm(x), plan, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
