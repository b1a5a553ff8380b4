"""Rotary position embeddings: positions as rotations of query and key pairs.

Source: Su et al., RoFormer (2021), section 3.4. Of the two usual layouts this is the half-split one (feature i turns
with feature i + H/2), which needs no strided access; the two differ by a fixed permutation of the features.

Shapes: B batch, T tokens, N heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryPositionalEmbeddings(nn.Module):
    """Rotates queries or keys by their positions; holds neither parameters nor buffers."""

    def __init__(self, head_size: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_size % 2:
            raise ValueError(f"head_size is {head_size}: rotary positions turn pairs, so it must be even")
        self.head_size = head_size
        self.theta = theta

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate x by its positions.

        Args:
            x: floating [B, T, N, H].
            positions: integer [B, T] or [T]; by default 0..T-1.

        Returns:
            [B, T, N, H], of x's dtype.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        return rotate(x, *rotation_of(positions, self.head_size, self.theta, x.dtype)).to(x.dtype)


def rotation_of(positions: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, computed once and shared by all layers.

    Angles are formed in float64: at position 32,768 float32 is already off by 2e-3 radians.

    Args:
        positions: integer [..., T].
        dtype: of the queries and keys; decides the result's precision.

    Returns:
        Two tensors [..., T, 1, H/2], float32 (float64 for float64 queries).
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    angles = (positions.double()[..., None] * theta**-exponents)[..., None, :]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(precision), angles.sin().to(precision)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of x [B, T, N, H]; the result has the wider of the dtypes of x and cos."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
