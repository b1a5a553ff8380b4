"""Initial weights of an image tokenizer with which it learns colour, not only shape.

With the default weights every convolution shrinks what passes, and drawings on white teach outlines long before hues:
a codebook placed then holds no colour, and never will. Here the two towers start close to an image pyramid instead:
resampling averages and repeats, shortcuts pass on, and the blocks between add little. What a square's mean colour is
reaches the latents, and the picture, from the first step; the blocks learn the rest.
"""

import torch
from torch import Tensor, nn

from pipelines.tokenizers.vqgan import VQGAN

BRANCH_GAIN = 0.2
"""Of the last convolution in each residual branch."""
NOISE_GAIN = 0.1
"""Of what a resampling or a shortcut does besides passing on: enough to break the symmetry."""


@torch.no_grad()
def start_as_pyramid(model: VQGAN) -> None:
    """Replace the weights of every convolution; the norms and the codebook stay as they are."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        if "downsample" in name:
            _pass_on(layer.weight, taps=slice(0, 2))  # The package pads below and on the right.
        elif "upsample" in name:
            _pass_on(layer.weight, taps=slice(1, 2))
        elif name.endswith("nin_shortcut"):
            _pass_on(layer.weight, taps=slice(0, 1))
        elif name.endswith(("conv2", "proj_out")):
            layer.weight.mul_(BRANCH_GAIN)


def _pass_on(weight: Tensor, taps: slice) -> None:
    """Let a convolution [O, I, k, k] hand its first inputs to its first outputs, averaged over the taps."""
    shared = min(weight.shape[:2])
    weight[:shared] *= NOISE_GAIN
    channels = torch.arange(shared)
    one = weight[channels, channels]
    one[:, taps, taps] += 1 / (taps.stop - taps.start) ** 2
    weight[channels, channels] = one
