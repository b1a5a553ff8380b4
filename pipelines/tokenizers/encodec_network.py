"""The network of an EnCodec model, made of the package's own modules.

Enters: a config and weights. Leaves: waveforms to codes and back, as tensors on one device. Always holds: parameters are
named as in the package, so that its checkpoints fit.

Source: High Fidelity Neural Audio Compression (Défossez et al., 2022), section 3; package encodec 0.1.1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.loudness import loudness_codes, loudness_gains

# Shapes: B batch, K codebooks, F frames, D latent dimension.

LINEAR_RMS = 0.2
"""Of signals inside a network that was just initialised."""


@contextlib.contextmanager
def _torchaudio_for_import() -> Iterator[None]:
    """Let `import encodec` pass where torchaudio is not installed: it needs torchaudio only for functions unused here."""
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is not None:
        yield
        return
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        yield
    finally:
        # A stub left behind would convince other libraries that torchaudio works.
        del sys.modules["torchaudio"]


class EncodecNetwork(nn.Module):
    """Encoder, quantizer and decoder of one EnCodec model, named as in the package, so that its checkpoints fit.

    Args:
        config: The architecture. Weights and codebooks start random.

    Raises:
        ImportError: the package encodec is not installed.
    """

    def __init__(self, config: AudioTokenizerConfig) -> None:
        super().__init__()
        try:
            with _torchaudio_for_import():
                modules = importlib.import_module("encodec.modules")
                quantization = importlib.import_module("encodec.quantization")
        except ModuleNotFoundError as fault:
            raise ImportError(
                f"the audio tokenizer needs the package encodec ({fault}): `make venv` installs it, "
                "or `pip install --no-deps encodec==0.1.1 einops`."
            ) from fault
        shape: dict[str, Any] = {
            "channels": config.channels,
            "dimension": config.dimension,
            "n_filters": config.n_filters,
            "n_residual_layers": config.n_residual_layers,
            "ratios": list(config.ratios),
            "norm": config.norm,
            "causal": config.causal,
            "pad_mode": config.pad_mode,
            "lstm": config.lstm,
            "true_skip": config.true_skip,
        }
        self.config = config
        self.encoder: nn.Module = modules.SEANetEncoder(**shape)
        self.decoder: nn.Module = modules.SEANetDecoder(**shape)
        self.quantizer: nn.Module = quantization.ResidualVectorQuantizer(
            dimension=config.dimension, n_q=config.quantizers, bins=config.codebook_size, kmeans_init=False
        )

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights under which the network is nearly linear, and passes waveforms at their level.

        Inside, signals have an RMS of `LINEAR_RMS`, where an ELU is almost the identity; shortcuts are the identity, and
        residual branches whisper. So the network starts as a filter bank and its inverse, which learn to follow waveforms
        within a few hundred steps; random layers of full nonlinearity scramble phase, and stay on a plateau of noise that
        merely has the right envelope.
        """
        for part, rms_in, rms_out in ((self.encoder, 0.1, 1.0), (self.decoder, 1.0, 0.1)):
            convolutions = [module for module in part.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]
            for module in convolutions:
                # A transposed convolution of kernel 2 x stride lets two taps of each input channel reach a sample.
                taps = 2 if isinstance(module, nn.ConvTranspose1d) else module.kernel_size[0]
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_channels * taps))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            for block in part.modules():
                if hasattr(block, "shortcut"):
                    branch, shortcut = block.get_submodule("block"), block.get_submodule("shortcut")
                    [module for module in branch.modules() if isinstance(module, nn.Conv1d)][-1].weight.mul_(0.2)
                    for convolution in (module for module in shortcut.modules() if isinstance(module, nn.Conv1d)):
                        nn.init.dirac_(convolution.weight)
            convolutions[0].weight.mul_(LINEAR_RMS / rms_in)
            convolutions[-1].weight.mul_(rms_out / LINEAR_RMS)

    @property
    def codebooks(self) -> list[nn.Module]:
        """The K codebook modules; each holds `embed` float32 [codebook_size, D]."""
        return [layer._codebook for layer in self.quantizer.vq.layers]  # type: ignore[union-attr]

    def encode(self, waveforms: Tensor, n_q: int) -> Tensor:
        """Codes of waveforms, float32 [B, 1, F * hop] -> int64 [B, n_q, F]."""
        if self.config.normalize:
            # As the package does it, to the bit.
            scale = 1e-8 + waveforms.square().mean(dim=2, keepdim=True).sqrt()
            waveforms, n_q = waveforms / scale, n_q - 1
        latents = self.encoder(waveforms.expand(-1, self.config.channels, -1))
        codes: Tensor = self.quantizer.vq.encode(latents, n_q=n_q).transpose(0, 1)  # type: ignore[operator, union-attr]
        if not self.config.normalize:
            return codes
        loudness = loudness_codes(scale, self.config.codebook_size)
        return torch.cat([loudness.expand(-1, -1, codes.shape[2]), codes], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Waveforms of codes, int64 [B, K, F] -> float32 [B, 1, F * hop]."""
        residual = codes[:, 1:] if self.config.normalize else codes
        waveforms: Tensor = self.decoder(self.quantizer.decode(residual.transpose(0, 1)))  # type: ignore[operator]
        if self.config.channels > 1:
            waveforms = waveforms.mean(dim=1, keepdim=True)
        if self.config.normalize:
            # All frames of a segment say the same; what a model generated may differ, and then the middle one counts.
            loudness = codes[:, :1].median(dim=2, keepdim=True).values
            waveforms = waveforms * loudness_gains(loudness, self.config.codebook_size)
        return waveforms

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all but the codebooks' running averages, which only training uses."""
        return {name: tensor for name, tensor in self.state_dict().items() if not _is_training_state(name)}

    def load_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Take weights as `weights()` gives them, or a whole state dict of the package.

        Raises:
            CheckpointError: tensors that are missing, too many, or of another shape.
        """
        own = self.weights()
        given = {name: tensor for name, tensor in weights.items() if not _is_training_state(name)}
        faults = [f"{name} is missing" for name in own.keys() - given.keys()]
        faults += [f"{name} is not part of this architecture" for name in given.keys() - own.keys()]
        faults += [
            f"{name} has shape {list(given[name].shape)}, not {list(own[name].shape)}"
            for name in own.keys() & given.keys()
            if own[name].shape != given[name].shape
        ]
        if faults:
            raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(sorted(faults)[:5])}.")
        self.load_state_dict(given, strict=False)
        for codebook in self.codebooks:
            codebook.embed_avg.copy_(codebook.embed)  # type: ignore[operator, union-attr, arg-type]
            codebook.cluster_size.fill_(1.0)  # type: ignore[operator, union-attr]
            codebook.inited.fill_(1.0)  # type: ignore[operator, union-attr]


def _is_training_state(name: str) -> bool:
    return name.endswith(("._codebook.inited", "._codebook.cluster_size", "._codebook.embed_avg"))
