"""Training of EnCodec's residual codebooks, on the package's own quantizer, without a host synchronisation.

The package's forward pass would do it too, with three differences that matter here: every codebook learns from the whole
batch even when quantizer dropout silences it for some clips; the commitment loss of a deep codebook reaches the encoder;
and a dead entry is restarted together with its running averages, so that it does not fall back at once.

Source: SoundStream (Zeghidour et al., 2021), sections 3.3 and 3.4; EnCodec, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.tokenizers.encodec import EncodecNetwork

# Shapes: B batch, D latent dimension, F frames, N = B * F vectors, E entries of a codebook.

DECAY = 0.99
DEAD_BELOW = 0.25
"""An entry is dead when it is chosen less often than this a step, in the running average."""
KMEANS_ROUNDS = 12


class CodebookTrainer:
    """Runs a network's quantizer in training, and updates its codebooks by exponential moving averages."""

    def __init__(self, network: EncodecNetwork) -> None:
        self.codebooks = network.codebooks
        self.codebook_size = network.config.codebook_size
        self.restarts = True
        self.ready = False

    @torch.no_grad()
    def initialise(self, latents: Tensor) -> None:
        """Set each codebook to the k-means centres of what the codebooks before it left over, from float32 [B, D, F]."""
        residual = latents.transpose(1, 2).flatten(0, 1)
        for codebook in self.codebooks:
            chosen = torch.randint(len(residual), (self.codebook_size,), device=residual.device)
            centres = residual[chosen] + 1e-4 * residual.std() * torch.randn_like(residual[chosen])
            for _ in range(KMEANS_ROUNDS):
                codes = _nearest(residual, centres)
                counts, sums = self._totals(residual, codes)
                centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
            codebook.embed.copy_(centres)  # type: ignore[operator, union-attr]
            self._reset_averages(codebook)
            residual = residual - F.embedding(_nearest(residual, centres), centres)
        self.ready = True

    def adopt(self) -> None:
        """Continue from loaded codebooks."""
        for codebook in self.codebooks:
            self._reset_averages(codebook)
        self.ready = True

    def quantize(self, latents: Tensor, depths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize each clip with its own number of codebooks, and let all codebooks learn.

        Args:
            latents: float32 [B, D, F] from the encoder.
            depths: int64 [B], codebooks to use for each clip.

        Returns:
            Quantized latents [B, D, F] whose gradient passes straight to `latents`; the commitment loss, a scalar; and how
            often each entry was chosen, float32 [K, E].
        """
        B, D, frames = latents.shape
        flat = latents.transpose(1, 2).reshape(-1, D)
        residual = flat.detach()
        quantized = torch.zeros_like(residual)
        commitment = flat.new_zeros(())
        counts = []
        per_vector = depths.repeat_interleave(frames, output_size=B * frames)[:, None]
        for depth, codebook in enumerate(self.codebooks):
            active = (per_vector > depth).to(flat.dtype)
            codes = _nearest(residual, codebook.embed)  # type: ignore[arg-type]
            chosen = F.embedding(codes, codebook.embed).clone()  # type: ignore[arg-type]
            # The encoder moves toward the sum so far; the residual's own target is this codebook's entry.
            commitment = commitment + (active * (flat - quantized - chosen).square()).mean()
            counts.append(self._learn(codebook, residual, codes))
            quantized = quantized + active * chosen
            residual = residual - chosen
        straight = flat + (quantized - flat).detach()
        return straight.view(B, frames, D).transpose(1, 2), commitment, torch.stack(counts)

    @torch.no_grad()
    def _learn(self, codebook: torch.nn.Module, vectors: Tensor, codes: Tensor) -> Tensor:
        counts, sums = self._totals(vectors, codes)
        size, average = codebook.cluster_size, codebook.embed_avg
        size.mul_(DECAY).add_(counts, alpha=1 - DECAY)  # type: ignore[operator, union-attr]
        average.mul_(DECAY).add_(sums, alpha=1 - DECAY)  # type: ignore[operator, union-attr]
        if self.restarts:
            dead = size < DEAD_BELOW  # type: ignore[operator]
            fresh = vectors[torch.randint(len(vectors), (self.codebook_size,), device=vectors.device)]
            size.copy_(torch.where(dead, torch.ones_like(counts), size))  # type: ignore[operator, union-attr, arg-type]
            average.copy_(torch.where(dead[:, None], fresh, average))  # type: ignore[operator, union-attr, arg-type]
        codebook.embed.copy_(average / size.clamp_min(1e-5)[:, None])  # type: ignore[operator, union-attr]
        return counts

    def _totals(self, vectors: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros(self.codebook_size, device=vectors.device).index_add_(
            0, codes, torch.ones_like(vectors[:, 0])
        )
        sums = torch.zeros(self.codebook_size, vectors.shape[1], device=vectors.device).index_add_(0, codes, vectors)
        return counts, sums

    def _reset_averages(self, codebook: torch.nn.Module) -> None:
        codebook.cluster_size.fill_(1.0)  # type: ignore[operator, union-attr]
        codebook.embed_avg.copy_(codebook.embed)  # type: ignore[operator, union-attr]


def _nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest entry, [N, D] and [E, D] -> int64 [N]."""
    return torch.addmm(entries.square().sum(1), vectors, entries.T, alpha=-2.0).argmin(dim=1)
