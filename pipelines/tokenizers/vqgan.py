"""Pictures to codes and back: a VQGAN.

What enters: uint8 [B, H, W, 3] in RGB, H and W multiples of `ImageTokenizer.downsampling`. What leaves: one code in
[0, codebook_size) for every `downsampling` x `downsampling` square. What always holds: on the CPU, with a fixed
number of threads, a picture's codes do not depend on what else is in the batch.

The network is that of VQGAN (Esser, Rombach and Ommer, "Taming Transformers for High-Resolution Image Synthesis",
2021), from the package taming-transformers-rom1504, so that published checkpoints of it fit by their names
(`encoder. decoder. quantize. quant_conv. post_quant_conv.`).
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.sequence import VocabularyError
from pipelines.tokenizers.checkpoint import CheckpointError, checkpoint_sha256, read_config, read_weights, resolve
from pipelines.tokenizers.gpu_batches import FixedBatches
from pipelines.tokenizers.gumbel import GumbelQuantizer

# Shapes: B batch, H W pixels, R C rows and columns of codes, Z latent channels, E embedding channels.

Pictures = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]

GPU_BATCH = 64
"""Pictures that a GPU encodes at a time: enough to fill it at 256 x 256, few enough for small ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Shape of the encoder or of the decoder, under the names of the original configuration files."""

    ch: int
    """Channels at full resolution; a multiple of 32, the number of groups in every GroupNorm."""
    ch_mult: tuple[int, ...]
    """Channel factor of each level; every level after the first halves the resolution."""
    num_res_blocks: int
    attn_resolutions: tuple[int, ...] = ()
    """Levels with attention, named by their height at the training resolution; the middle always has it."""

    def __post_init__(self) -> None:
        if self.ch < 32 or self.ch % 32 or not self.ch_mult:
            raise ValueError(f"ch must be a positive multiple of 32 and ch_mult not empty, found {self}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTokenizerConfig:
    """Everything that, with the weights, fixes what an image tokenizer computes."""

    encoder: TowerConfig
    decoder: TowerConfig
    z_channels: int
    """Channels between the towers and the 1x1 convolutions around the codebook."""
    embed_dim: int
    """Channels of one codebook entry."""
    codebook_size: int
    resolution: int
    """Height and width of the training pictures. Others work, best near it."""
    norm_groups: int = 32
    """Groups of every GroupNorm. The package fixes 32, which in layers of 32 channels leaves one channel to a group: each
    is then normalized by itself over the picture, and what it says of absolute colour is lost."""
    quantizer: str = "nearest"
    """"nearest" entry of the codebook, or "gumbel": the best of the scores that a layer gives every code."""

    def __post_init__(self) -> None:
        if len(self.encoder.ch_mult) != len(self.decoder.ch_mult):
            raise ValueError(
                f"encoder and decoder need equally many levels, found ch_mult {self.encoder.ch_mult} "
                f"and {self.decoder.ch_mult}."
            )
        if self.quantizer not in ("nearest", "gumbel"):
            raise ValueError(f'quantizer must be "nearest" or "gumbel", found {self.quantizer!r}.')
        if self.norm_groups < 1 or 32 % self.norm_groups:
            raise ValueError(f"norm_groups must divide 32, found {self.norm_groups}.")
        if self.resolution % self.downsampling:
            raise ValueError(f"resolution {self.resolution} is no multiple of the downsampling {self.downsampling}.")

    @property
    def downsampling(self) -> int:
        """Pixels of one code in each direction."""
        return int(2 ** (len(self.encoder.ch_mult) - 1))

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        return {"kind": "image", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ImageTokenizerConfig":
        """Read what `to_json` gave, after "kind" was taken off.

        Raises:
            TypeError, ValueError: a missing or unknown key, or values that make no network.
        """
        towers: dict[str, TowerConfig] = {}
        for tower in ("encoder", "decoder"):
            given = values.get(tower)
            if not isinstance(given, dict):
                raise ValueError(f"{tower} must be an object with the fields of TowerConfig, found {given!r}.")
            # JSON has lists where the network's configuration has tuples.
            shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            towers[tower] = TowerConfig(**shape)
        return cls(**{**values, **towers})


class VQGAN(nn.Module):
    """The network: encoder, codebook, decoder, and the 1x1 convolutions around the codebook.

    Raises:
        ModuleNotFoundError: taming-transformers-rom1504 is not installed.
    """

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        try:
            # Not taming.models.vqgan, which imports an old pytorch_lightning and torchvision.
            from taming.modules.diffusionmodules.model import Decoder, Encoder
            from taming.modules.vqvae.quantize import VectorQuantizer2
        except ModuleNotFoundError as fault:
            raise ModuleNotFoundError(
                f"image tokenizers need taming-transformers-rom1504 and einops ({fault.name} is missing): "
                "run `make venv`, or install Braid with the extra [tokenizers]."
            ) from fault
        common = {
            "in_channels": 3,
            "out_ch": 3,
            "resolution": config.resolution,
            "z_channels": config.z_channels,
            "double_z": False,
        }
        self.encoder = Encoder(**dataclasses.asdict(config.encoder), **common)
        with contextlib.redirect_stdout(io.StringIO()):  # The package's Decoder prints its latent shape.
            self.decoder = Decoder(**dataclasses.asdict(config.decoder), **common)
        for layer in self.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.num_groups = config.norm_groups
        if config.quantizer == "gumbel":
            self.quantize: Any = GumbelQuantizer(config.codebook_size, config.embed_dim)
        else:
            # legacy=False puts the commitment weight on the encoder's term, where the paper has it.
            self.quantize = VectorQuantizer2(
                config.codebook_size, config.embed_dim, beta=0.25, sane_index_shape=True, legacy=False
            )
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents before quantization [B, E, R, C]."""
        return self.quant_conv(self.encoder(images))

    def images(self, embedded: Tensor) -> Tensor:
        """Codebook entries [B, E, R, C] to images [B, 3, H, W], nominally in [-1, 1]."""
        return self.decoder(self.post_quant_conv(embedded))


class ImageTokenizer:
    """A VQGAN with its weights, from pixels to codes and from codes to pixels."""

    def __init__(
        self,
        config: ImageTokenizerConfig,
        model: VQGAN,
        *,
        name: str,
        sha256: str,
        dtype: torch.dtype = torch.float32,
        batch_size: int = GPU_BATCH,
    ) -> None:
        """Take over a model, float32 and where it is to run; see `load`."""
        self.config = config
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.sha256 = sha256
        """Identity of config and weights, which enters fingerprints."""
        self.dtype = dtype
        self._on_gpu: FixedBatches | None = None
        if self._device.type == "cuda":
            fused = dtype is not torch.float32
            encode = _fused_encoder(model, dtype) if fused else self._codes
            self._on_gpu = FixedBatches(encode, batch_size, self._device, graph=fused)
        model.to(dtype)
        model.quantize.float()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int = GPU_BATCH,
    ) -> "ImageTokenizer":
        """Load a shipped tokenizer by name, or any by its folder.

        Args:
            dtype: Of the two towers; distances to the codebook are always float32. float16 encodes several times as fast
                on a GPU. Another dtype or device class may give other codes for a few squares in a thousand: `agreement`
                measures it.
            batch_size: Pictures that a GPU encodes at a time. Like the dtype it is part of what fixes the codes.

        Raises:
            CheckpointError: no such tokenizer, one of another kind, or weights that do not fit its config.
            ValueError: a dtype that is none of float32, float16 and bfloat16, or no positive batch size.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16) or batch_size < 1:
            raise ValueError(
                f"an image tokenizer takes float32, float16 or bfloat16 and a positive batch size, "
                f"found {dtype} and {batch_size}."
            )
        folder = resolve(name_or_path)
        values = read_config(folder, "image")
        try:
            config = ImageTokenizerConfig.from_json(values)
        except (TypeError, ValueError) as fault:
            raise CheckpointError(f"{folder}/config.json describes no image tokenizer: {fault}") from fault
        model = VQGAN(config)
        try:
            model.load_state_dict(read_weights(folder))
        except RuntimeError as fault:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {fault}") from fault
        model.to(device)
        sha256 = checkpoint_sha256(folder)
        return cls(config, model, name=folder.name, sha256=sha256, dtype=dtype, batch_size=batch_size)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        """Pixels of one code in each direction."""
        return self.config.downsampling

    def encode(self, pixels: Pictures) -> NDArray[np.int32]:
        """Tokenize a batch of pictures of one size.

        Args:
            pixels: uint8 [B, H, W, 3], RGB, or a list of [H, W, 3]; H and W multiples of `downsampling`.

        Returns:
            int32 [B, H / downsampling, W / downsampling], values in [0, codebook_size).

        Raises:
            ValueError: another dtype or shape.
            FloatingPointError: a picture whose activations the dtype cannot hold.
        """
        return self.start(pixels)()

    @torch.inference_mode()
    def start(self, pixels: Pictures) -> Callable[[], NDArray[np.int32]]:
        """Begin to tokenize pictures; what is returned waits for their codes: see `encode`.

        On a GPU, whoever starts the next pictures before asking for these codes keeps it busy between the two.
        """
        height, width = self._check_pixels(pixels)
        if not len(pixels):
            return lambda: np.empty((0, height // self.downsampling, width // self.downsampling), np.int32)
        if self._on_gpu:
            pending = self._on_gpu.start(pixels)
            return lambda: self._whole(pending())
        # Convolution kernels are chosen by batch size, and their rounding flips about one code in some thousands.
        # One by one, a picture's codes are its own; batching gains nothing on a CPU.
        codes = np.concatenate([self._codes(torch.from_numpy(picture[None].copy())).numpy() for picture in pixels])
        return lambda: self._whole(codes)

    def _whole(self, codes: NDArray[np.int32]) -> NDArray[np.int32]:
        lost = (codes < 0).any((1, 2))
        if lost.any():
            raise FloatingPointError(
                f"picture {int(lost.argmax())} of {len(codes)}: {self.name!r} computes numbers that {self.dtype} cannot "
                "hold; load it with bfloat16 or float32."
            )
        return codes

    def agreement(self, reference: "ImageTokenizer", pixels: NDArray[np.uint8]) -> float:
        """Share of the codes of pictures that equal those of `reference`, the same tokenizer in float32, say."""
        return float((self.encode(pixels) == reference.encode(pixels)).mean())

    @torch.inference_mode()
    def decode(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Reconstruct pictures.

        Args:
            codes: Integers [B, R, C], values in [0, codebook_size).

        Returns:
            uint8 [B, R * downsampling, C * downsampling, 3], RGB.

        Raises:
            VocabularyError: a code lies outside the codebook.
            ValueError: another dtype or shape.
        """
        self._check_codes(codes)
        indices = torch.from_numpy(codes.astype(np.int64)).to(self._device)
        parts = indices.split(1) if self._device.type == "cpu" else [indices]
        images = [self._pixels(part) for part in parts if len(part)]
        if not images:
            return np.empty((0, *(side * self.downsampling for side in codes.shape[1:]), 3), np.uint8)
        return torch.cat(images).cpu().numpy()

    @property
    def _device(self) -> torch.device:
        return self.model.quant_conv.weight.device

    def _codes(self, pixels: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to int32 [B, R, C]; -1 where a latent vector is not finite."""
        with _exact_convolutions():
            latents = self.model.latents(as_images(pixels, self.dtype)).float()
            _, _, (_, _, indices) = self.model.quantize(latents)
        return torch.where(latents.isfinite().all(1), indices, -1).to(torch.int32)

    def _pixels(self, codes: Tensor) -> Tensor:
        """int64 [B, R, C] to uint8 [B, H, W, 3]."""
        embedded = self.model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, self.config.embed_dim))
        return as_pixels(self.model.images(embedded.to(self.model.quant_conv.weight.dtype)))

    def _check_pixels(self, pixels: Pictures) -> tuple[int, int]:
        """Height and width of pictures that can be encoded."""
        found = [pixels] if isinstance(pixels, np.ndarray) else [picture[None] for picture in pixels]
        shapes = {(str(array.dtype), array.shape) for array in found}
        dtype, shape = next(iter(shapes), ("nothing", ()))
        if len(shapes) != 1 or len(shape) != 4 or shape[3] != 3 or dtype != "uint8":
            what = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(shapes)) or "nothing"
            raise ValueError(f"encode takes uint8 [B, H, W, 3], found {what}.")
        height, width = shape[1:3]
        if min(height, width) == 0 or height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"pictures of {height} x {width} pixels: tokenizer {self.name!r} takes positive multiples of "
                f"{self.downsampling} in both directions; use fit_picture first."
            )
        return height, width

    def _check_codes(self, codes: NDArray[np.integer[Any]]) -> None:
        if codes.ndim != 3 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"decode takes integers [B, rows, columns], found {codes.dtype} {list(codes.shape)}.")
        outside = (codes < 0) | (codes >= self.codebook_size)
        if outside.any():
            picture, row, column = (int(i) for i in np.argwhere(outside)[0])
            raise VocabularyError(
                f"code {int(codes[picture, row, column])} of picture {picture} at row {row}, column {column} lies "
                f"outside the codebook of {self.name!r}, [0, {self.codebook_size}); {int(outside.sum())} such code(s)."
            )


def _fused_encoder(model: VQGAN, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The encoder of a float32 model on a GPU, in half precision; the model's own weights are no longer needed for it."""
    # Only here: it needs Triton, which torch for the CPU lacks.
    from pipelines.tokenizers.vqgan_encoder import FusedEncoder
    from pipelines.tokenizers.vqgan_kernels import Codebook

    quantizer = model.quantize
    if isinstance(quantizer, GumbelQuantizer):
        codebook = Codebook.of(quantizer.proj.weight.flatten(1), quantizer.proj.bias)  # type: ignore[arg-type]
    else:
        entries = quantizer.embedding.weight
        codebook = Codebook.of(entries, -entries.square().sum(1) / 2)
    return FusedEncoder(model.encoder, model.quant_conv, codebook, dtype)


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """float32 as on the CPU: cuDNN would round to TF32, and would choose an algorithm by timing."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def as_images(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, H, W, 3] to [B, 3, H, W] in [-1, 1], which is what the network sees."""
    return (pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1).to(dtype)


def as_pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], clipped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
