"""All hyperparameters of the unified transformer, and what follows from them: sizes and costs.

What enters is a handful of numbers; what leaves is a frozen, validated configuration that counts its own parameters and
floating-point operations without building anything.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

MODALITIES = ("text", "image", "audio")
"""Names in the order of the modality ids 0, 1, 2."""

BackendChoice = Literal["auto", "flash_attn_4", "flash_attn", "varlen", "sdpa"]
BlockChoice = Literal["auto", "fused", "torch"]
NormPlacement = Literal["pre", "reordered"]
FlopsConvention = Literal["full", "causal"]


class ConfigError(ValueError):
    """A hyperparameter is unknown, has the wrong type, or cannot work; the message names field, value and remedy."""


def _default_device() -> str:
    # Here, because it takes a second, and a configuration with a device needs nothing of it.
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class UnifiedTransformerConfig:
    """Hyperparameters of `UnifiedTransformer`. The defaults are the reference configuration of 7.60 B parameters."""

    text_vocab_size: int = 50257
    image_vocab_size: int = 16384
    audio_vocab_size: int = 1024
    hidden_size: int = 4096
    num_layers: int = 36
    num_attention_heads: int = 32
    ffn_hidden_size: int = 16384
    max_sequence_length: int = 4096
    """Longest sequence, in tokens, that the model is meant for; with learned positions also the size of their table."""
    use_flash_attention: bool = True
    """Use a FlashAttention kernel where there is one; False means PyTorch's scaled dot-product attention everywhere."""
    attention_backend: BackendChoice = "auto"
    """Force one backend of `model.attention`; "auto" takes the first that can run."""
    block_backend: BlockChoice = "auto"
    """How a block is computed: as one function with a backward pass of its own ("fused", see `model.fused`), or as plain
    PyTorch that `torch.compile` takes ("torch"). "auto" is fused on CUDA where the weights are bfloat16 or float16."""
    use_rope: bool = True
    """Rotary positions on queries and keys; False means learned positions added to the embeddings."""
    rope_theta: float = 10000.0
    tie_text_embeddings: bool = True
    """True: text logits use the text embedding as their matrix. False: a dedicated linear head."""
    dropout: float = 0.0
    """On the embeddings and on what each residual branch adds. Attention probabilities are never dropped: kernels
    differ in whether they can, and every backend must compute the same function."""
    qk_norm: bool = False
    """LayerNorm over each head's queries and keys (Chameleon, 2024, section 2.3)."""
    norm_placement: NormPlacement = "pre"
    """"pre": x + f(norm(x)). "reordered": x + norm(f(x)), which bounds what a branch may add (Chameleon, 2024, section 2.3;
    Swin v2, 2021; OLMo 2, 2024, section 3.2)."""
    z_loss_weight: float = 0.0
    """Weight of the squared log-partition term in the loss (PaLM, 2022, section 5: 1e-4; Chameleon: 1e-5)."""
    layer_norm_eps: float = 1e-5
    initializer_std: float | None = None
    """Standard deviation of the initial weights; None means sqrt(2 / (5 hidden_size)), see `model.initialization`."""
    loss_chunk_tokens: int = 2048
    """At most this many rows of logits exist at once while the loss is computed; memory, not mathematics."""
    device: str = field(default_factory=_default_device)
    """Where `model.to(config.device)` puts the model. A property of the machine: `to_dict` leaves it out."""

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}: it must be an integer of at least 1")
        for name in ("use_flash_attention", "use_rope", "tie_text_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        for name in ("rope_theta", "dropout", "z_loss_weight", "layer_norm_eps", "initializer_std"):
            value = getattr(self, name)
            if value is None and name == "initializer_std":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} is {value!r}: it must be a finite number")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}: change one so that every head gets an equal part"
            )
        if self.use_rope and self.head_size % 2:
            raise ConfigError(
                f"hidden_size / num_attention_heads is {self.head_size}: rotary positions turn pairs, so make the head "
                "size even, or set use_rope to false"
            )
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}: it must be positive (10000 is usual)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}: it is a probability, at least 0 and below 1")
        if self.z_loss_weight < 0:
            raise ConfigError(f"z_loss_weight is {self.z_loss_weight!r}: it must not be negative (0 turns it off)")
        if self.layer_norm_eps <= 0:
            raise ConfigError(f"layer_norm_eps is {self.layer_norm_eps!r}: it must be positive (1e-5 is usual)")
        if self.initializer_std is not None and self.initializer_std <= 0:
            raise ConfigError(
                f"initializer_std is {self.initializer_std!r}: it must be positive, or null for the default"
            )
        if self.attention_backend not in get_args(BackendChoice):
            raise ConfigError(
                f"attention_backend is {self.attention_backend!r}: choose one of {', '.join(get_args(BackendChoice))}"
            )
        for name, choices in (("block_backend", BlockChoice), ("norm_placement", NormPlacement)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}")
        if not self.use_flash_attention and self.attention_backend not in ("auto", "sdpa"):
            raise ConfigError(
                f"attention_backend is {self.attention_backend!r} while use_flash_attention is false: "
                "set use_flash_attention to true, or attention_backend to 'sdpa'"
            )

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """Vocabulary size by modality name, in the order of the modality ids."""
        return {"text": self.text_vocab_size, "image": self.image_vocab_size, "audio": self.audio_vocab_size}

    def to_dict(self) -> dict[str, Any]:
        """Every field but `device`, as plain values for a `config.json`."""
        values = asdict(self)
        del values["device"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnifiedTransformerConfig:
        """The inverse of `to_dict`; fields left out keep their defaults.

        Raises:
            ConfigError: a key is no field of the configuration, or a value cannot work.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"the fields are {', '.join(known)}"
                raise ConfigError(f"{key!r} (value {values[key]!r}) is no field of UnifiedTransformerConfig: {hint}")
        return cls(**values)

    def num_parameters(self) -> int:
        """Exact number of parameters; tied weights count once."""
        D = self.hidden_size
        block = 4 * D * D + 2 * D * self.ffn_hidden_size + 2 * D + (2 * self.head_size if self.qk_norm else 0)
        embeddings = (sum(self.vocab_sizes.values()) + len(MODALITIES)) * D
        positions = 0 if self.use_rope else self.max_sequence_length * D
        heads = sum(self.vocab_sizes.values()) * D - (self.text_vocab_size * D if self.tie_text_embeddings else 0)
        return self.num_layers * block + embeddings + positions + heads + D

    def flops_per_token(
        self,
        sequence_length: int,
        convention: FlopsConvention = "full",
        target_shares: Mapping[str, float] | None = None,
    ) -> float:
        """Floating-point operations of forward and backward for one token, without recomputation.

        6 x the parameters that multiply + 12 x layers x hidden x length (Chowdhery et al., PaLM, 2022, appendix B).
        "causal" halves the attention term, since a causal kernel computes half. A position is predicted by one head
        only, so of the heads their mean counts, weighted by `target_shares`.

        Args:
            sequence_length: length that attention runs over, in tokens.
            target_shares: share of the target tokens by modality, summing to 1; the default is one third each, which
                gives 51.3 GFLOP (47.7 causal) for the reference configuration at length 4096.
        """
        shares = {name: 1 / len(MODALITIES) for name in MODALITIES} if target_shares is None else target_shares
        D = self.hidden_size
        head = D * sum(size * shares.get(name, 0.0) for name, size in self.vocab_sizes.items())
        matmul_parameters = self.num_layers * (4 * D * D + 2 * D * self.ffn_hidden_size) + head
        attention = 12 * self.num_layers * D * sequence_length
        return 6 * matmul_parameters + (attention / 2 if convention == "causal" else attention)


_POSITIVE_INTEGERS = (
    "text_vocab_size",
    "image_vocab_size",
    "audio_vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "ffn_hidden_size",
    "max_sequence_length",
    "loss_chunk_tokens",
)
