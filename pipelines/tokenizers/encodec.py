"""Sound to codes and back with EnCodec: a causal convolutional codec with residual vector quantization.

Enters: mono float32 waveforms at the tokenizer's sample rate (`pipelines.corpus.sounds` makes them). Leaves: int32 codes
[frames, K], frame by frame, codebook 0 first. Always holds: a clip of n samples has ceil(n / hop) frames, and its codes do
not depend on the clips encoded beside it.

Reproducibility: float arithmetic groups differently in differently shaped batches, which flips a few codes in a thousand
where two entries are nearly as close. So the shape in which a clip is computed depends on that clip alone: on the CPU a
batch of one, on an accelerator always `GPU_ROWS` rows of the clip's own length bucket, unused rows silent. Codes repeat
exactly on one device class with one thread count; between device classes a fraction of a percent differs.

Source: High Fidelity Neural Audio Compression (Défossez et al., 2022), section 3; package encodec 0.1.1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.sequence import VocabularyError
from pipelines.tokenizers.checkpoint import (
    CheckpointError,
    checkpoint_sha256,
    read_config,
    read_weights,
    resolve,
    write_checkpoint,
)

# Shapes: B batch, K codebooks, F frames, D latent dimension.

GPU_ROWS = 16
"""Rows of every batch on an accelerator; a constant, because codes depend on it."""
LINEAR_RMS = 0.2
"""Of signals inside a network that was just initialised."""
BUCKET_FRAMES = 64
"""Clips on an accelerator are padded to a multiple of this many frames; the padding's codes are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioTokenizerConfig:
    """The architecture, as the package's `SEANetEncoder`, `SEANetDecoder` and `ResidualVectorQuantizer` name it."""

    sample_rate_hz: int
    n_q: int
    codebook_size: int = 1024
    channels: int = 1
    n_filters: int = 32
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    dimension: int = 128
    n_residual_layers: int = 1
    lstm: int = 2
    causal: bool = True
    pad_mode: str = "constant"
    """"constant" is causal to the sample; "reflect" (EnCodec's own) lets the first frames see a little of what follows."""
    norm: str = "none"
    """"none" for weights with weight normalization folded in, "weight_norm" for checkpoints as trained."""

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)

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
        if config.channels != 1:
            raise CheckpointError(
                f"{where}: channels is {config.channels}, but Braid's audio is mono: convert a mono model."
            )
        return config


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
        }
        self.config = config
        self.encoder: nn.Module = modules.SEANetEncoder(**shape)
        self.decoder: nn.Module = modules.SEANetDecoder(**shape)
        self.quantizer: nn.Module = quantization.ResidualVectorQuantizer(
            dimension=config.dimension, n_q=config.n_q, bins=config.codebook_size, kmeans_init=False
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
        codes: Tensor = self.quantizer.vq.encode(self.encoder(waveforms), n_q=n_q)  # type: ignore[operator, union-attr]
        return codes.transpose(0, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Waveforms of codes, int64 [B, K, F] -> float32 [B, 1, F * hop]."""
        return self.decoder(self.quantizer.decode(codes.transpose(0, 1)))  # type: ignore[no-any-return, operator]

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


class AudioTokenizer:
    """An EnCodec model ready to encode and decode, or a view of its first codebooks.

    Args:
        network: On the CPU or already on `device`.
        name: What cards, errors and datasets call it.
        sha256: Identity of the checkpoint; a view has its checkpoint's.
        n_q: Use the first `n_q` codebooks; all when None.
        device: Where to compute.
    """

    def __init__(
        self,
        network: EncodecNetwork,
        *,
        name: str,
        sha256: str,
        n_q: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if n_q is not None and not 1 <= n_q <= network.config.n_q:
            raise ValueError(f"n_q is {n_q}, but the audio tokenizer {name} has 1 to {network.config.n_q} codebooks.")
        self.config = network.config
        self.name = name
        self.sha256 = sha256
        self.n_q = n_q or network.config.n_q
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(
        cls, folder_or_shipped_name: str | Path, n_q: int | None = None, device: str | torch.device = "cpu"
    ) -> AudioTokenizer:
        """Load a tokenizer's folder, or one that comes with Braid by its name.

        Raises:
            CheckpointError: nothing there, or not an audio tokenizer.
            ValueError: `n_q` exceeds the checkpoint's codebooks.
        """
        folder = resolve(folder_or_shipped_name)
        network = EncodecNetwork(AudioTokenizerConfig.from_json(read_config(folder, "audio"), str(folder)))
        network.load_weights(read_weights(folder), str(folder))
        return cls(network, name=folder.name, sha256=checkpoint_sha256(folder), n_q=n_q, device=device)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write `config.json` and `weights.safetensors`; all codebooks, also from a view."""
        config = {"kind": "audio", **asdict(self.config), "ratios": list(self.config.ratios)}
        return write_checkpoint(folder, config, self.network.weights(), dtype)

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms on both sides."""
        return self.config.sample_rate_hz

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.config.hop

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.config.sample_rate_hz / self.config.hop

    @property
    def codebook_size(self) -> int:
        """Entries of each codebook."""
        return self.config.codebook_size

    def frames(self, samples: int) -> int:
        """Frames of a clip of that many samples."""
        return -(-samples // self.hop)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode clips; each clip's codes are the same whatever its neighbours.

        Args:
            waveforms: float32 [samples] each, at `sample_rate_hz`, nominally in [-1, 1], at least one sample.

        Returns:
            int32 [frames, n_q] each, values in [0, codebook_size); the last frame is completed with silence.

        Raises:
            ValueError: a waveform that is not one-dimensional, or empty; the message names which.
        """
        for index, waveform in enumerate(waveforms):
            if waveform.ndim != 1 or not len(waveform):
                raise ValueError(
                    f"waveform {index} has shape {list(waveform.shape)}: give mono float32 [samples], at least one sample."
                )
        codes: list[np.ndarray] = [np.empty(0)] * len(waveforms)
        for indices, frames in self._batches([self.frames(len(waveform)) for waveform in waveforms]):
            rows = torch.zeros(self._rows, 1, frames * self.hop)
            for row, index in enumerate(indices):
                rows[row, 0, : len(waveforms[index])] = torch.from_numpy(
                    np.ascontiguousarray(waveforms[index], np.float32)
                )
            with _exact_convolutions():
                encoded = self.network.encode(rows.to(self.device), self.n_q).to(torch.int32).cpu().numpy()
            for row, index in enumerate(indices):
                codes[index] = np.ascontiguousarray(encoded[row, :, : self.frames(len(waveforms[index]))].T)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Reconstruct one clip.

        Args:
            codes: integers [frames, K], K from 1 to `n_q`: the first codebooks alone give a coarser sound.

        Returns:
            float32 [frames * hop] at `sample_rate_hz`, nominally in [-1, 1].

        Raises:
            VocabularyError: another shape, or a code outside its codebook; the message names codebook, frame and value.
        """
        return self.decode_batch([codes])[0]

    @torch.inference_mode()
    def decode_batch(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Reconstruct clips that have the same number of codebooks; see `decode`."""
        for codes in clips:
            self._check(codes)
        depths = sorted({codes.shape[1] for codes in clips})
        if len(depths) > 1:
            raise VocabularyError(f"clips of one batch have {depths} codebooks: decode clips of equal depth together.")
        waveforms: list[np.ndarray] = [np.empty(0)] * len(clips)
        for indices, frames in self._batches([len(codes) for codes in clips]):
            rows = torch.zeros(self._rows, depths[0], frames, dtype=torch.int64)
            for row, index in enumerate(indices):
                rows[row, :, : len(clips[index])] = torch.from_numpy(clips[index].astype(np.int64).T)
            with _exact_convolutions():
                decoded = self.network.decode(rows.to(self.device)).float().cpu().numpy()
            for row, index in enumerate(indices):
                waveforms[index] = decoded[row, 0, : len(clips[index]) * self.hop].copy()
        return waveforms

    @property
    def _rows(self) -> int:
        return 1 if self.device.type == "cpu" else GPU_ROWS

    def _batches(self, frames: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Groups of clips to compute together, with the frames to pad them to: (indices, frames)."""
        if self.device.type == "cpu":
            yield from (([index], count) for index, count in enumerate(frames))
            return
        buckets: dict[int, list[int]] = {}
        for index, count in enumerate(frames):
            buckets.setdefault(-(-count // BUCKET_FRAMES) * BUCKET_FRAMES, []).append(index)
        for length, indices in sorted(buckets.items()):
            yield from ((indices[start : start + GPU_ROWS], length) for start in range(0, len(indices), GPU_ROWS))

    def _check(self, codes: np.ndarray) -> None:
        if codes.ndim != 2 or not len(codes) or not 1 <= codes.shape[1] <= self.n_q:
            raise VocabularyError(
                f"codes have shape {list(codes.shape)}, but {self.name} decodes [frames, K] with at least one frame "
                f"and K from 1 to {self.n_q}."
            )
        outside = (codes < 0) | (codes >= self.codebook_size)
        if outside.any():
            frame, codebook = np.argwhere(outside)[0]
            raise VocabularyError(
                f"code {codes[frame, codebook]} of codebook {codebook} in frame {frame} lies outside "
                f"[0, {self.codebook_size}) of {self.name}; {int(outside.sum())} such codes in all. Audio ids are "
                f"code + codebook * {self.codebook_size}: subtract the codebook's offset first."
            )


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """float32 as on the CPU: cuDNN would round to TF32, and would choose an algorithm by timing."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
