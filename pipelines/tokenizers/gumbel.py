"""The quantizer of a VQGAN that was trained with Gumbel-Softmax: scores for every code, of which the best counts.

Enters: latents [B, E, R, C]. Leaves: codes, and their entries. Always holds: the same latents give the same codes. The
package's `GumbelQuantize` draws noise even outside training, so its codes differ from call to call; the best score is the
code that it draws most often. Its names are kept, so that its checkpoints fit.

Source: Categorical Reparameterization with Gumbel-Softmax (Jang, Gu and Poole, 2016).
"""

from __future__ import annotations

from torch import Tensor, nn

# Shapes: B batch, R C rows and columns of codes, E embedding channels.


class GumbelQuantizer(nn.Module):
    """Stands where `VectorQuantizer2` stands in a VQGAN."""

    def __init__(self, codebook_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(embed_dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, embed_dim)

    def forward(self, latents: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Entries [B, E, R, C], and in the last place codes, int64 [B, R, C]."""
        codes = self.proj(latents).argmax(dim=1)
        return self.embed(codes).permute(0, 3, 1, 2), None, (None, None, codes)

    def get_codebook_entry(self, codes: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Entries [B, E, R, C] of codes [B * R * C]; shape is (B, R, C, E)."""
        entries: Tensor = self.embed(codes).view(shape)
        return entries.permute(0, 3, 1, 2).contiguous()
