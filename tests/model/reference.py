"""The model written a second time, in float64, numpy and plain loops, token by token, from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np

from model import UnifiedTransformer


def rope(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One head's vector [H], turned pair by pair: the complex number x[i] + j x[i + H/2] times exp(j angle)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        turned = complex(x[i], x[i + half]) * np.exp(1j * position * theta ** (-2 * i / len(x)))
        out[i], out[i + half] = turned.real, turned.imag
    return out


def layer_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(x.var() + eps) * scale


def attention_of_document(
    q: list[np.ndarray], k: list[np.ndarray], v: list[np.ndarray], num_heads: int
) -> list[np.ndarray]:
    """Causal attention over one document's vectors [D], head by head and query by query."""
    head_size = len(q[0]) // num_heads
    outputs = []
    for t in range(len(q)):
        out = np.zeros_like(q[0])
        for h in range(num_heads):
            part = slice(h * head_size, (h + 1) * head_size)
            scores = np.array([q[t][part] @ k[s][part] / math.sqrt(head_size) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for s in range(t + 1):
                out[part] += weights[s] * v[s][part]
        outputs.append(out)
    return outputs


class Reference:
    """Runs a `UnifiedTransformer`'s weights on one document at a time."""

    def __init__(self, model: UnifiedTransformer) -> None:
        self.config = model.config
        self.w = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def attention(self, xs: list[np.ndarray], prefix: str) -> list[np.ndarray]:
        c = self.config
        qkv = [self.w[f"{prefix}.qkv.weight"] @ x for x in xs]
        q, k, v = ([part[i * c.hidden_size : (i + 1) * c.hidden_size] for part in qkv] for i in range(3))
        for t in range(len(xs)):
            for h in range(c.num_attention_heads):
                part = slice(h * c.head_size, (h + 1) * c.head_size)
                if c.qk_norm:
                    q[t][part] = layer_norm(q[t][part], self.w[f"{prefix}.query_norm.weight"], c.layer_norm_eps)
                    k[t][part] = layer_norm(k[t][part], self.w[f"{prefix}.key_norm.weight"], c.layer_norm_eps)
                if c.use_rope:
                    q[t][part] = rope(q[t][part], t, c.rope_theta)
                    k[t][part] = rope(k[t][part], t, c.rope_theta)
        mixed = attention_of_document(q, k, v, c.num_attention_heads)
        return [self.w[f"{prefix}.output.weight"] @ x for x in mixed]

    def feed_forward(self, x: np.ndarray, prefix: str) -> np.ndarray:
        wide = self.w[f"{prefix}.input.weight"] @ x
        gelu = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in wide])
        return self.w[f"{prefix}.output.weight"] @ gelu

    def block(self, xs: list[np.ndarray], prefix: str) -> list[np.ndarray]:
        eps = self.config.layer_norm_eps
        first, second = (self.w[f"{prefix}.{name}_norm.weight"] for name in ("attention", "feed_forward"))
        if self.config.norm_placement == "reordered":
            mixed = self.attention(xs, f"{prefix}.attention")
            xs = [x + layer_norm(y, first, eps) for x, y in zip(xs, mixed, strict=True)]
            return [x + layer_norm(self.feed_forward(x, f"{prefix}.feed_forward"), second, eps) for x in xs]
        mixed = self.attention([layer_norm(x, first, eps) for x in xs], f"{prefix}.attention")
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        return [x + self.feed_forward(layer_norm(x, second, eps), f"{prefix}.feed_forward") for x in xs]

    def hidden_states(self, ids: list[int], modalities: list[int]) -> list[np.ndarray]:
        names = ("text", "image", "audio")
        xs = [
            self.w[f"embeddings.{names[m]}.weight"][i] + self.w["modality_embedding.weight"][m]
            for i, m in zip(ids, modalities, strict=True)
        ]
        if not self.config.use_rope:
            xs = [x + self.w["position_embedding.weight"][t] for t, x in enumerate(xs)]
        for index in range(self.config.num_layers):
            xs = self.block(xs, f"blocks.{index}")
        return [layer_norm(x, self.w["final_norm.weight"], self.config.layer_norm_eps) for x in xs]

    def losses(self, ids: list[int], modalities: list[int]) -> list[tuple[str, float, float]]:
        """For each token but the first: modality, negative log likelihood, log-partition."""
        names = ("text", "image", "audio")
        hidden = self.hidden_states(ids, modalities)
        out = []
        for t in range(len(ids) - 1):
            name = names[modalities[t + 1]]
            tied = name == "text" and self.config.tie_text_embeddings
            logits = self.w[f"embeddings.{name}.weight" if tied else f"heads.{name}.weight"] @ hidden[t]
            log_partition = math.log(sum(math.exp(value) for value in logits))
            out.append((name, log_partition - float(logits[ids[t + 1]]), log_partition))
        return out
