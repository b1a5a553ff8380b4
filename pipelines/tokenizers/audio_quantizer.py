"""Training of EnCodec's residual codebooks, on the package's own quantizer, without a host synchronisation.

The package's forward pass would do it too, with three differences that matter here: every codebook learns from the whole
batch even when quantizer dropout silences it for some clips; the commitment loss of a deep codebook reaches the encoder;
and a dead entry is restarted together with its running averages, so that it does not fall back at once.

Source: SoundStream (Zeghidour et al., 2021), sections 3.3 and 3.4; EnCodec, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.tokenizers.encodec import EncodecNetwork

# Shapes: B batch, D latent dimension, F frames, N = B * F vectors, E entries of a codebook, K codebooks.

DECAY = 0.99
DEAD_SHARE = 0.1
"""An entry is dead when it is chosen less often than this share of the mean, in the running average."""
KMEANS_ROUNDS = 12


class Quantized(NamedTuple):
    """What one batch became."""

    latents: Tensor
    """[B, D, F]; its gradient passes straight to the encoder's latents."""
    commitment: Tensor
    """Scalar loss: how far latents are from what they were quantized to, the mean over codebooks."""
    counts: Tensor
    """float32 [K, E]: how often each entry was chosen."""
    residuals: Tensor
    """[K, N, D]: what each codebook had to quantize."""


class CodebookTrainer:
    """Runs a network's quantizer in training, and updates its codebooks by exponential moving averages."""

    def __init__(self, network: EncodecNetwork) -> None:
        self.codebooks = network.codebooks
        self.codebook_size = network.config.codebook_size

    @torch.no_grad()
    def initialise(self, latents: Tensor, generator: torch.Generator | None = None) -> None:
        """Set each codebook to the k-means centres of what the codebooks before it left over, from float32 [B, D, F]."""
        residual = latents.transpose(1, 2).flatten(0, 1)
        for codebook in self.codebooks:
            chosen = _draw(len(residual), self.codebook_size, residual.device, generator)
            # Vectors can be fewer than entries: without noise, entries drawn twice would stay equal for ever.
            centres = residual[chosen] + 1e-4 * residual.std() * torch.randn_like(residual[chosen])
            for _ in range(KMEANS_ROUNDS):
                codes = _nearest(residual, centres)
                counts, sums = self._totals(residual, codes)
                centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
            codebook.embed.copy_(centres)  # type: ignore[operator, union-attr]
            residual = residual - F.embedding(_nearest(residual, centres), centres)
        self.adopt()

    @torch.no_grad()
    def adopt(self) -> None:
        """Start the running averages at the codebooks as they are."""
        for codebook in self.codebooks:
            codebook.cluster_size.fill_(1.0)  # type: ignore[operator, union-attr]
            codebook.embed_avg.copy_(codebook.embed)  # type: ignore[operator, union-attr, arg-type]

    def quantize(self, latents: Tensor, depths: Tensor) -> Quantized:
        """Quantize each clip with its own number of codebooks, and let all codebooks learn.

        Args:
            latents: float32 [B, D, F] from the encoder.
            depths: int64 [B], codebooks to use for each clip.
        """
        B, D, frames = latents.shape
        flat = latents.transpose(1, 2).reshape(-1, D)
        residual = flat.detach()
        quantized = torch.zeros_like(residual)
        commitment = flat.new_zeros(())
        counts, residuals = [], []
        per_vector = depths[:, None].expand(B, frames).reshape(-1, 1)
        for depth, codebook in enumerate(self.codebooks):
            active = (per_vector > depth).to(flat.dtype)
            codes = _nearest(residual, codebook.embed)  # type: ignore[arg-type]
            chosen = F.embedding(codes, codebook.embed).clone()  # type: ignore[arg-type]
            # The encoder moves toward the sum so far; the residual's own target is this codebook's entry.
            commitment = commitment + (active * (flat - quantized - chosen).square()).mean()
            counts.append(self._learn(codebook, residual, codes))
            residuals.append(residual)
            quantized = quantized + active * chosen
            residual = residual - chosen
        straight = flat + (quantized - flat).detach()
        return Quantized(
            straight.view(B, frames, D).transpose(1, 2),
            commitment / len(self.codebooks),
            torch.stack(counts),
            torch.stack(residuals),
        )

    @torch.no_grad()
    def restart(self, residuals: Tensor, generator: torch.Generator | None = None) -> None:
        """Put dead entries where vectors are: `residuals` of the last batch, [K, N, D].

        A restarted entry counts as one chosen as often as the mean, so that it has time to prove itself.
        """
        for codebook, vectors in zip(self.codebooks, residuals, strict=True):
            size, average, entries = codebook.cluster_size, codebook.embed_avg, codebook.embed
            mean = size.mean()  # type: ignore[operator, union-attr]
            dead = size < DEAD_SHARE * mean  # type: ignore[operator]
            fresh = vectors[_draw(len(vectors), self.codebook_size, vectors.device, generator)]
            size.copy_(torch.where(dead, mean, size))  # type: ignore[operator, union-attr, arg-type]
            average.copy_(torch.where(dead[:, None], fresh * mean, average))  # type: ignore[operator, union-attr, arg-type]
            entries.copy_(torch.where(dead[:, None], fresh, entries))  # type: ignore[operator, union-attr, arg-type]

    @torch.no_grad()
    def _learn(self, codebook: torch.nn.Module, vectors: Tensor, codes: Tensor) -> Tensor:
        counts, sums = self._totals(vectors, codes)
        size, average = codebook.cluster_size, codebook.embed_avg
        size.mul_(DECAY).add_(counts, alpha=1 - DECAY)  # type: ignore[operator, union-attr]
        average.mul_(DECAY).add_(sums, alpha=1 - DECAY)  # type: ignore[operator, union-attr]
        codebook.embed.copy_(average / size.clamp_min(1e-5)[:, None])  # type: ignore[operator, union-attr, arg-type]
        return counts

    def _totals(self, vectors: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros(self.codebook_size, device=vectors.device).index_add_(
            0, codes, torch.ones_like(vectors[:, 0])
        )
        sums = torch.zeros(self.codebook_size, vectors.shape[1], device=vectors.device).index_add_(0, codes, vectors)
        return counts, sums


def _draw(below: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(below, (count,), device=device, generator=generator)


def _nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest entry, [N, D] and [E, D] -> int64 [N]."""
    return torch.addmm(entries.square().sum(1), vectors, entries.T, alpha=-2.0).argmin(dim=1)
