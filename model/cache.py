"""Keys and values of the tokens already seen, for generation.

The cache is allocated once. Slot p of a row holds the key and value of that row's token at position p, so a causal mask
over positions is all that attention needs, also when prompts differ in length: what padding wrote beyond a prompt's end
is never seen, and the next tokens overwrite it.

Shapes: L layers, B batch, S slots, T new tokens, N heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import UnifiedTransformerConfig


class CacheError(ValueError):
    """More tokens than the cache has room for, or a use it is not made for."""


class LayerCache:
    """One layer's part of a `KeyValueCache`."""

    __slots__ = ("keys", "rows", "slots", "values")

    def __init__(self, keys: Tensor, values: Tensor, slots: int, rows: Tensor | None = None) -> None:
        self.keys = keys
        self.values = values
        self.slots = slots
        """Slots in use by any row once the new tokens are written."""
        self.rows = rows
        """For prompts into an empty cache: int64 [B, T] or [B, 1], the row that each new token belongs to; what it attends to
        is all new. None where new tokens follow what the rows of the batch hold."""

    def update(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values, and return all those that they attend to.

        Args:
            k, v: [B, T, N, H].
            positions: integer [B, T].

        Returns:
            Keys and values [B, S, N, H], of k's dtype.
        """
        rows = torch.arange(k.shape[0], device=k.device)[:, None] if self.rows is None else self.rows
        self.keys[rows, positions] = k.to(self.keys.dtype)
        self.values[rows, positions] = v.to(self.values.dtype)
        if self.rows is not None:
            return k, v
        return self.keys[:, : self.slots].to(k.dtype), self.values[:, : self.slots].to(v.dtype)


class KeyValueCache:
    """Preallocated keys and values of all layers, for a batch of sequences of different lengths.

    `UnifiedTransformer.prefill` and `decode_step` read and advance it. It serves inference: no gradient passes through.
    """

    def __init__(
        self,
        config: UnifiedTransformerConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate 2 x layers x batch_size x max_length x hidden_size numbers.

        Args:
            max_length: tokens a row may hold, prompt and continuation together.
            device: default `config.device`.
            dtype: best the type that the model computes in.
        """
        if max_length > config.max_sequence_length:
            raise CacheError(
                f"max_length is {max_length}: the model is made for sequences of at most "
                f"{config.max_sequence_length} tokens (max_sequence_length)"
            )
        device = config.device if device is None else device
        shape = (config.num_layers, batch_size, max_length, config.num_attention_heads, config.head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """int64 [B]: tokens that each row holds."""
        self.occupied = 0
        """On the host: no row holds more tokens than this."""

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        """Tokens a row may hold."""
        return self.keys.shape[2]

    def require_room(self, batch_size: int, new_tokens: int) -> None:
        """Refuse, before anything is written, what does not fit.

        Raises:
            CacheError: another batch size, too many tokens, or gradients are being recorded.
        """
        if batch_size != self.batch_size:
            raise CacheError(
                f"a batch of {batch_size} rows for a cache of {self.batch_size}: make a cache of that size"
            )
        if self.occupied + new_tokens > self.max_length:
            raise CacheError(
                f"{self.occupied} tokens held and {new_tokens} new ones: the cache has room for {self.max_length}; "
                "make it with a larger max_length"
            )
        if torch.is_grad_enabled():
            raise CacheError(
                "gradients are being recorded, and none pass through a cache: call it under torch.no_grad()"
            )

    def layer(self, index: int, new_tokens: int, rows: Tensor | None = None) -> LayerCache:
        """The part of one layer, about to receive `new_tokens` tokens a row; for `rows` see `LayerCache`."""
        return LayerCache(self.keys[index], self.values[index], self.occupied + new_tokens, rows)

    def advance(self, written: int, real: Tensor | None = None) -> None:
        """Count the tokens just written as held.

        Args:
            written: tokens a row that the last forward pass wrote.
            real: integer [B], how many of them, from the left, were no padding; default all.
        """
        self.lengths += written if real is None else real
        self.occupied += written

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.lengths.zero_()
        self.occupied = 0
