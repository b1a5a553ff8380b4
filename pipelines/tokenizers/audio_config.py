"""What an EnCodec model is, apart from its weights: the content of an audio tokenizer's `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipelines.tokenizers.checkpoint import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioTokenizerConfig:
    """The architecture, as the package's `SEANetEncoder`, `SEANetDecoder` and `ResidualVectorQuantizer` name it."""

    sample_rate_hz: int
    n_q: int
    """Codes a frame; with `normalize`, the loudness is the first of them."""
    codebook_size: int = 1024
    channels: int = 1
    """2 for a stereo model: it hears the same on both sides, and what it says is mixed down."""
    n_filters: int = 32
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    dimension: int = 128
    n_residual_layers: int = 1
    lstm: int = 2
    true_skip: bool = False
    """Whether the way around a residual block is the identity, and not a convolution."""
    causal: bool = True
    pad_mode: str = "constant"
    """"constant" is causal to the sample; "reflect" (EnCodec's own) lets the first frames see a little of what follows."""
    norm: str = "none"
    """"none" for weights with weight normalization folded in, "weight_norm" for checkpoints as trained, "time_group_norm"
    for a model that has norms over time."""
    normalize: bool = False
    """Scale what the encoder hears to an RMS of 1, and say the loudness in the first codebook (`loudness`)."""
    segment_frames: int | None = None
    """Compute a sound in segments of so many frames, each by itself."""

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)

    @property
    def quantizers(self) -> int:
        """Codebooks of the residual quantizer."""
        return self.n_q - self.normalize

    @property
    def bears_padding(self) -> bool:
        """Whether silence after a sound leaves the sound's own codes as they are."""
        return self.causal and not self.normalize and self.norm != "time_group_norm"

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> AudioTokenizerConfig:
        """Check and read what `config.json` holds.

        Raises:
            CheckpointError: an unknown or missing key, or a tokenizer that Braid cannot run.
        """
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted({"sample_rate_hz", "n_q"} - set(values))
        if unknown or missing:
            raise CheckpointError(
                f"{where}: unknown keys {unknown}, missing keys {missing}; known are {sorted(known)}."
            )
        config = cls(**{**values, "ratios": tuple(values.get("ratios", (8, 5, 4, 2)))})
        if config.channels not in (1, 2):
            raise CheckpointError(f"{where}: channels is {config.channels}, but Braid's audio is mono: 1 or 2 will do.")
        if config.quantizers < 1:
            raise CheckpointError(
                f"{where}: n_q is {config.n_q}, which leaves no codebook" + " beside the loudness." * config.normalize
            )
        if config.causal and config.norm == "time_group_norm":
            raise CheckpointError(f"{where}: norms over time see what follows, so the model cannot be causal.")
        return config
