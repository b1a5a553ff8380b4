"""An EnCodec network in training, and the running average of it that is kept.

Enters: a network with plain weights. Leaves: waveforms and latents whose gradients reach weights under weight normalization,
and in the end the network with plain weights again.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from pipelines.tokenizers.audio_quantizer import CodebookTrainer
from pipelines.tokenizers.encodec import EncodecNetwork

# Shapes: B batch, D latent dimension, F frames.


class Codec(nn.Module):
    """An EnCodec network in training: bfloat16 where that is safe, weight normalization, codebooks that learn.

    Args:
        network: Plain weights; `finished` gives them back.
        mixed_precision: bfloat16 for all but the LSTMs, and the first and last layers.
    """

    def __init__(self, network: EncodecNetwork, *, mixed_precision: bool) -> None:
        super().__init__()
        self.network = network
        self.mixed_precision = mixed_precision
        for module in _convolutions(network):
            weight_norm(module)
        self.codebooks = CodebookTrainer(network)

    def encode(self, waveforms: Tensor) -> Tensor:
        """float32 [B, 1, samples] -> latents, float32 [B, D, F]."""
        return self._run(self.network.encoder.model, waveforms).float()  # type: ignore[arg-type]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents, float32 [B, D, F] -> float32 [B, 1, samples]."""
        return self._run(self.network.decoder.model, latents).float()  # type: ignore[arg-type]

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            # cuDNN has no bfloat16 LSTM everywhere; 8 bits of mantissa at either end would be audible as noise.
            exact = hasattr(layer, "lstm") or index == 0 or index >= len(layers) - 2
            mixed = self.mixed_precision and not exact
            # Cached casts would outlive a captured graph.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
                x = layer(x.float() if exact else x)
        return x

    def finished(self) -> EncodecNetwork:
        """The network with weight normalization folded into plain weights."""
        network = copy.deepcopy(self.network)
        for module in _convolutions(network):
            parametrize.remove_parametrizations(module, "weight")
        return network.float()


class Average:
    """Exponential moving average of a codec's weights and codebooks: what is saved."""

    DECAY = 0.995

    def __init__(self, codec: Codec) -> None:
        self.codec = copy.deepcopy(codec)
        self._own, self._live = _tensors(self.codec), _tensors(codec)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past: what came before the codebooks is another model."""
        torch._foreach_copy_(self._own, self._live)

    @torch.no_grad()
    def update(self) -> None:
        """Move toward the live codec."""
        torch._foreach_lerp_(self._own, self._live, 1 - self.DECAY)


def _convolutions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]


def _tensors(codec: Codec) -> list[Tensor]:
    return [*codec.network.parameters(), *(codebook.embed for codebook in codec.network.codebooks)]  # type: ignore[list-item]
