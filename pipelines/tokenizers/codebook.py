"""Learning a codebook by moving averages instead of by gradients, so that every code is used.

Entries follow the mean of the latents assigned to them (van den Oord et al., "Neural Discrete Representation
Learning", 2017, appendix A.1); entries that lose their latents start again where the error is largest.
"""

import torch
from torch import Tensor

# Shapes: N latents, K codes, E embedding channels.


class MovingCodebook:
    """Keeps `weight` [K, E] at the moving means of the latents that chose each code. No gradient, no host sync."""

    DECAY = 0.99
    DEAD = 0.03
    """An entry chosen less often than this share of the average is dead."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = self.weight.clone()

    @torch.no_grad()
    def initialize(self, latents: Tensor, rounds: int = 12) -> None:
        """Place the entries by k-means on latents [N, E], N at least K."""
        size = len(self.weight)
        if len(latents) < size:
            raise ValueError(f"{len(latents)} latents cannot initialise {size} codes: use larger or more pictures.")
        self.weight.copy_(latents[torch.randperm(len(latents), device=latents.device)[:size]])
        for _ in range(rounds):
            error, codes = nearest(latents, self.weight)
            counts, sums = _gather(latents, codes, size)
            spread = latents[torch.multinomial(error + 1e-12, size)]
            self.weight.copy_(torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), spread))
        self.counts.fill_(1.0)
        self.sums.copy_(self.weight)

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, *, restart: bool) -> None:
        """Move the entries toward latents [N, E] that chose `codes` [N]; replace dead ones if `restart`."""
        size = len(self.weight)
        counts, sums = _gather(latents, codes, size)
        average = len(latents) / size
        # In units of the average, so that neither the batch size nor the first steps matter.
        self.counts.lerp_(counts / average, 1 - self.DECAY)
        self.sums.lerp_(sums / average, 1 - self.DECAY)
        if restart:
            error = (latents - self.weight[codes]).square().sum(dim=1)
            fresh = latents[torch.multinomial(error + 1e-12, size, replacement=True)]
            dead = self.counts < self.DEAD
            self.counts.copy_(torch.where(dead, 0.2, self.counts))
            self.sums.copy_(torch.where(dead[:, None], 0.2 * fresh, self.sums))
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])


def nearest(latents: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance [N] to, and index [N] of, the nearest entry of `weight` [K, E]."""
    found = [torch.cdist(part, weight).min(dim=1) for part in latents.split(65536)]
    return torch.cat([f.values for f in found]).square(), torch.cat([f.indices for f in found])


def perplexity(counts: Tensor) -> float:
    """Effective number of codes in use, from how often each was used [K]: K if all are used alike."""
    share = counts.double() / counts.sum()
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum()))


def _gather(latents: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(size, device=latents.device).index_add_(0, codes, torch.ones_like(latents[:, 0]))
    sums = torch.zeros(size, latents.shape[1], device=latents.device).index_add_(0, codes, latents)
    return counts, sums
