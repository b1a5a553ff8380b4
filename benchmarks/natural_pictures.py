"""Pictures that look like something, made by rule: colours with the statistics of photographs, shapes with texture.

Pure noise and flat areas are easy or hard for a tokenizer in ways that photographs are not; these have fine and coarse
detail, gradients, sharp and soft edges and saturated places, and need no download.
"""

from __future__ import annotations

import torch
from torch import Tensor


def natural_pictures(count: int, size: int, *, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """uint8 [count, size, size, 3] on `device`; other devices draw other numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.stack([_picture(size, generator) for _ in range(count)])


def _picture(size: int, generator: torch.Generator) -> Tensor:
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    # How many, and how steep: on the CPU, so that nothing waits for a GPU.
    choose = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=device)))
    shapes, slope = int(torch.randint(8, (1,), generator=choose)), 0.9 + 0.6 * float(torch.rand(1, generator=choose))
    frequency = torch.fft.fftfreq(size, device=device)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().clamp(min=1 / size)
    noise = torch.randn(4, size, size, generator=generator, device=device)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * radius**-slope).real
    noise = noise / noise.std((1, 2), keepdim=True)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size, device=device)] * 2, indexing="ij")
    picture = uniform(3, 1, 1) + (uniform(3, 1, 1) - 0.5) * x + (uniform(3, 1, 1) - 0.5) * y
    picture = picture + 0.27 * uniform(1) * noise[:1] + 0.05 * noise[1:]
    for index in range(shapes):
        (left, top, angle), half = uniform(3), 0.04 + 0.3 * uniform(2)
        sine, cosine = (3.14 * angle).sin(), (3.14 * angle).cos()
        u = ((x - left) * cosine + (y - top) * sine) / half[0]
        v = ((y - top) * cosine - (x - left) * sine) / half[1]
        distance = (u.square() + v.square()).sqrt() if index % 2 else torch.maximum(u.abs(), v.abs())
        mask = torch.sigmoid((1 - distance) * half[0] / (0.002 + 0.05 * uniform(1) ** 3))
        texture = torch.roll(noise[1:], 37 * index, 2) * 0.12 * uniform(1)
        picture = picture * (1 - mask) + mask * (uniform(3, 1, 1) + texture + 0.2 * (uniform(1) - 0.5) * u)
    picture = picture + 0.02 * uniform(1) * torch.randn(3, size, size, generator=generator, device=device)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
