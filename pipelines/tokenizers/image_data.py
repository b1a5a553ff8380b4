"""The pictures that an image tokenizer is trained on: each decoded once, held in memory, varied on the device."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import Pixels, fit_picture, load_picture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2"})
HELD_OUT_SHARE = 0.03
INVERTED_SHARE = 0.05
RECOLOURED_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Pictures for training in two sizes, and held-out ones in the tokenizer's."""

    whole: Pixels
    """uint8 [N, R, R, 3]: the whole picture on white, as the tokenizer will see it."""
    large: Pixels
    """uint8 [N, L, L, 3], L = 5/4 R: from this, crops without resampling."""
    held_out: Pixels
    """uint8 [M, R, R, 3]."""
    refused: tuple[str, ...]
    """Why files were left out."""


def is_held_out(relative: Path) -> bool:
    """Whether a picture is kept from training: by its path without suffix, so a converted copy falls alike."""
    digest = hashlib.sha256(relative.with_suffix("").as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def read_pictures(folder: Path, resolution: int, workers: int = 8) -> PictureSet:
    """Read every picture under `folder`; damaged ones are left out and named in the result.

    A picture that equals a held-out one pixel by pixel, as copies in several folders do, is not trained on.

    Raises:
        MediaError: fewer than two pictures to train on, or none to hold out.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)

    def read(path: Path) -> tuple[Pixels, Pixels] | str:
        try:
            pixels = load_picture(path.read_bytes(), str(path.relative_to(folder)))
        except MediaError as fault:
            return str(fault)
        # Any multiple does here: the larger size is only cropped from.
        return tuple(fit_picture(pixels, side, multiple=1) for side in (resolution, resolution * 5 // 4))  # type: ignore[return-value]

    with ThreadPoolExecutor(workers) as pool:
        read_all = list(pool.map(read, paths))
    refused = tuple(found for found in read_all if isinstance(found, str))
    good = [(p, found) for p, found in zip(paths, read_all, strict=True) if not isinstance(found, str)]
    held_out = [whole for p, (whole, _) in good if is_held_out(p.relative_to(folder))]
    known = {whole.tobytes() for whole in held_out}
    training = [pair for p, pair in good if pair[0].tobytes() not in known]
    if len(training) < 2 or not held_out:
        raise MediaError(
            f"{folder}: {len(paths)} picture files, of which {len(training)} to train on and {len(held_out)} held out; "
            f"training needs at least 2 and 1 (about {HELD_OUT_SHARE:.0%} are held out, so give some hundreds)."
        )
    return PictureSet(
        whole=np.stack([whole for whole, _ in training]),
        large=np.stack([large for _, large in training]),
        held_out=np.stack(held_out),
        refused=refused,
    )


class Batches:
    """Endless varied batches of images [B, 3, R, R] in [-1, 1], made on the device from pictures that live there."""

    def __init__(self, pictures: PictureSet, batch_size: int, device: torch.device, seed: int) -> None:
        self.whole = torch.from_numpy(pictures.whole).to(device)
        self.large = torch.from_numpy(pictures.large).to(device)
        self.batch_size, self.device = batch_size, device
        self.random = torch.Generator(device).manual_seed(seed)

    def next(self) -> Tensor:
        """Half whole pictures, some of them shifted, and half crops of enlarged ones."""
        half = self.batch_size // 2
        resolution = self.whole.shape[1]
        slack = resolution // 8
        still = self._chance(half, 0.5)
        shift = torch.where(still[:, None], slack, self._integers(2 * slack + 1, half, 2))
        whole = self._crop(self.whole, half, shift, pad=slack)
        corner = self._integers(self.large.shape[1] + 2 * slack - resolution + 1, self.batch_size - half, 2)
        pixels = torch.cat([whole, self._crop(self.large, self.batch_size - half, corner, pad=slack)])
        return self._vary(pixels)

    def _crop(self, source: Tensor, count: int, corner: Tensor, pad: int) -> Tensor:
        """Windows of the tokenizer's size, at the corners [B, 2] of pictures laid on white with a margin of `pad`."""
        chosen = source[self._integers(len(source), count)]
        chosen = F.pad(chosen, (0, 0, pad, pad, pad, pad), value=255)
        side = torch.arange(self.whole.shape[1], device=self.device)
        rows, columns = corner[:, :1] + side, corner[:, 1:] + side
        return chosen[torch.arange(count, device=self.device)[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _vary(self, pixels: Tensor) -> Tensor:
        """Mirror half, exchange the colour channels of some, invert a few: drawings have more colours than these."""
        count = len(pixels)
        mirrored = self._chance(count, 0.5)[:, None, None, None]
        pixels = torch.where(mirrored, pixels.flip(2), pixels)
        order = torch.rand(count, 3, generator=self.random, device=self.device).argsort(dim=1)
        plain = torch.arange(3, device=self.device).expand(count, 3)
        order = torch.where(self._chance(count, RECOLOURED_SHARE)[:, None], order, plain)
        pixels = pixels.gather(3, order[:, None, None, :].expand_as(pixels))
        pixels = torch.where(self._chance(count, INVERTED_SHARE)[:, None, None, None], 255 - pixels, pixels)
        # The permuted view of [B, H, W, C] is what torch calls channels_last.
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.random, device=self.device)

    def _chance(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self.random, device=self.device) < share
