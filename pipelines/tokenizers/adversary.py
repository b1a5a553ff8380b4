"""A discriminator that teaches an image decoder to draw sharp edges where L1 would blur them."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchAdversary(nn.Module):
    """PatchGAN with hinge loss, as VQGAN has it, with the feature matching of pix2pixHD (Wang et al., 2018).

    Two strided layers see patches of 34 pixels: enough to judge an outline, too little to invent an object.
    """

    def __init__(self, *, lr: float, width: int = 64) -> None:
        super().__init__()
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

        self.net = NLayerDiscriminator(input_nc=3, ndf=width, n_layers=2).apply(weights_init)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, betas=(0.5, 0.9))

    def features(self, images: Tensor) -> list[Tensor]:
        """What each layer with a nonlinearity saw, and last the verdict on each patch."""
        found, x, layers = [], images, list(self.net.main)
        for layer, following in pairwise([*layers, None]):
            x = layer(x)
            if isinstance(layer, nn.LeakyReLU) or following is None:
                found.append(x)
        return found

    def learn(self, images: Tensor, fakes: Tensor) -> Tensor:
        """One step of telling pictures from reconstructions; returns its loss."""
        self.net.requires_grad_(True)
        real, fake = self.features(images)[-1].float(), self.features(fakes.detach())[-1].float()
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def teach(self, images: Tensor, fakes: Tensor) -> Tensor:
        """Loss of the decoder: fool the verdict, and match the features of the true picture."""
        self.net.requires_grad_(False)
        with torch.no_grad():
            wanted = self.features(images)
        found = self.features(fakes)
        matching = torch.stack([(a - b).float().abs().mean() for a, b in zip(found[:-1], wanted[:-1], strict=True)])
        return 4 * matching.mean() - found[-1].float().mean()


def balanced_gradient(fakes: Tensor, main: Tensor, adversarial: Tensor, share: float) -> Tensor:
    """Gradient at the reconstruction, in which the adversary pulls `share` times as hard as the main loss.

    VQGAN balances at the last layer's weights; at its output it costs no second backward pass through the decoder.
    """
    (pull,) = torch.autograd.grad(main, fakes)
    (push,) = torch.autograd.grad(adversarial, fakes)
    return pull + share * push * (pull.float().norm() / push.float().norm().clamp(min=1e-12)).to(push.dtype)
