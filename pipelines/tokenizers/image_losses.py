"""How far a reconstruction is from its picture: figures for the card, and losses for training.

Images are [B, 3, H, W] float in [-1, 1] throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [B]; at most 100, which stands for equal pictures."""
    error = ((images - others) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each picture, [B], at most 1.

    Source: Wang, Bovik, Sheikh and Simoncelli (2004): 11 x 11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, taken
    on each colour channel where the window fits, and averaged.
    """
    steps = torch.arange(11, dtype=torch.float32, device=images.device) - 5
    bell = torch.exp(-(steps**2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    channels = images.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, bell.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, bell.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)

    return _ssim_map((images + 1) / 2, (others + 1) / 2, blur).mean(dim=(1, 2, 3))


def chroma_error(images: Tensor, others: Tensor) -> Tensor:
    """Mean absolute error of the colour differences R - G and B - G of each picture, [B], of 255: blind to brightness."""
    return _chroma((images - others) * 127.5).abs().mean(dim=(1, 2, 3))


def without_chroma(images: Tensor) -> Tensor:
    """Grey copies of the same shape: every channel is the mean of the three."""
    return images.mean(dim=1, keepdim=True).expand_as(images)


def sharpness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of each picture, [B]: blur lowers it, noise raises it."""
    down, right = _differences(images.float())
    return down.square().mean(dim=(1, 2, 3)) + right.square().mean(dim=(1, 2, 3))


def reconstruction_loss(images: Tensor, others: Tensor) -> Tensor:
    """What training minimises, a scalar: L1, edges, structure, areas and chroma.

    L1 alone lets thin outlines fade, which in a drawing carry the meaning: L1 of the gradients on two scales and 1 - SSIM
    on 7 x 7 boxes hold them. L1 of 8 x 8 means holds the colour of areas, which edges and structure do not see, and L1 of
    the colour differences R - G and B - G, of pixels and of 8 x 8 means, the hue, which is a small share of the rest.
    The weights bring all to the same order of magnitude.
    """
    images, others = images.float(), others.float()
    edges = torch.zeros((), device=images.device)
    coarse, coarse_others = images, others
    for _ in range(2):
        for one, other in zip(_differences(coarse), _differences(coarse_others), strict=True):
            edges = edges + (one - other).abs().mean()
        coarse, coarse_others = F.avg_pool2d(coarse, 2), F.avg_pool2d(coarse_others, 2)
    similarity = _ssim_map((images + 1) / 2, (others + 1) / 2, lambda x: F.avg_pool2d(x, 7, stride=1)).mean()
    error = images - others
    areas = F.avg_pool2d(error, 8)
    chroma = _chroma(error).abs().mean() + _chroma(areas).abs().mean()
    return error.abs().mean() + 0.5 * edges + 0.3 * (1 - similarity) + areas.abs().mean() + 0.5 * chroma


def _chroma(images: Tensor) -> Tensor:
    """R - G and B - G, [B, 2, H, W]."""
    return images[:, ::2] - images[:, 1:2]


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[:, :, 1:] - images[:, :, :-1], images[:, :, :, 1:] - images[:, :, :, :-1]


def _ssim_map(x: Tensor, y: Tensor, blur) -> Tensor:  # type: ignore[no-untyped-def]
    """SSIM at every place, for values in [0, 1] and a given local mean."""
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
    return luminance * structure
