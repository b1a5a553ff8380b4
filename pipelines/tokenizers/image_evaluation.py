"""Figures of an image tokenizer on held-out pictures, and a sheet to look at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.corpus.pictures import Pixels
from pipelines.tokenizers.codebook import perplexity
from pipelines.tokenizers.image_losses import chroma_error, psnr, sharpness, ssim, without_chroma
from pipelines.tokenizers.vqgan import ImageTokenizer, as_images

COLOURED = 1.0
"""A picture has colour if its grey copy has a greater chroma error than this, of 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Pictures, what became of them, and figures of each."""

    originals: Pixels
    reconstructions: Pixels
    """uint8 [N, H, W, 3] both."""
    figures: dict[str, torch.Tensor]
    """By name, float32 [N]."""
    counts: NDArray[np.int64]
    """How often each code was used."""


def evaluate(tokenizer: ImageTokenizer, pictures: Pixels, batch_size: int = 64) -> dict[str, Any]:
    """Encode, decode and compare.

    Args:
        pictures: uint8 [N, H, W, 3], not seen in training.

    Returns:
        What `summary` says.
    """
    return summary(compare(tokenizer, pictures, batch_size))


def compare(
    tokenizer: ImageTokenizer, pictures: Pixels, batch_size: int = 64, watch: Callable[[int], None] = lambda done: None
) -> Comparison:
    """Encode and decode pictures, uint8 [N, H, W, 3]; `watch` is told how many are done."""
    counts = np.zeros(tokenizer.codebook_size, np.int64)
    found: dict[str, list[torch.Tensor]] = {
        "psnr_db": [],
        "ssim": [],
        "l1_of_255": [],
        "sharp": [],
        "sharp_original": [],
        "chroma": [],
        "chroma_grey": [],
    }
    reconstructions = np.empty_like(pictures)
    for start in range(0, len(pictures), batch_size):
        originals = pictures[start : start + batch_size]
        codes = tokenizer.encode(originals)
        counts += np.bincount(codes.ravel(), minlength=len(counts))
        decoded = tokenizer.decode(codes)
        reconstructions[start : start + len(decoded)] = decoded
        x, y = as_images(torch.from_numpy(originals)), as_images(torch.from_numpy(decoded))
        found["psnr_db"].append(psnr(x, y))
        found["ssim"].append(ssim(x, y))
        found["l1_of_255"].append((x - y).abs().mean(dim=(1, 2, 3)) * 127.5)
        found["sharp"].append(sharpness(y))
        found["sharp_original"].append(sharpness(x))
        found["chroma"].append(chroma_error(x, y))
        found["chroma_grey"].append(chroma_error(x, without_chroma(x)))
        watch(start + len(originals))
    return Comparison(
        originals=pictures,
        reconstructions=reconstructions,
        figures={name: torch.cat(values) for name, values in found.items()},
        counts=counts,
    )


def summary(comparison: Comparison) -> dict[str, Any]:
    """The figures of a comparison.

    Returns:
        JSON values: means over pictures of PSNR in dB, SSIM and L1 (of 255); sharpness of the reconstructions relative
        to the pictures (1 is alike, less is blurred); over pictures with colour, the chroma error (of 255) beside that
        of their grey copies as the yardstick (None if no picture has colour); the number of codes used, and their
        perplexity.
    """
    figures, counts = comparison.figures, comparison.counts
    coloured = figures["chroma_grey"] > COLOURED
    chroma = {
        "chroma_error": figures["chroma"][coloured].mean(),
        "chroma_error_of_grey": figures["chroma_grey"][coloured].mean(),
    }
    mean = {name: float(values.mean()) for name, values in figures.items()}
    return {
        "pictures": len(comparison.originals),
        "psnr_db": round(mean["psnr_db"], 3),
        "ssim": round(mean["ssim"], 4),
        "l1_of_255": round(mean["l1_of_255"], 3),
        "relative_sharpness": round(mean["sharp"] / mean["sharp_original"], 4),
        **{name: round(float(value), 3) if coloured.any() else None for name, value in chroma.items()},
        "coloured_pictures": int(coloured.sum()),
        "codes_used": int((counts > 0).sum()),
        "codebook_size": len(counts),
        "perplexity": round(perplexity(torch.from_numpy(counts)), 1),
    }


def write_sheet(tokenizer: ImageTokenizer, pictures: Pixels, path: Path, columns: int = 12, bands: int = 4) -> None:
    """Write a PNG of pictures with, under each, its reconstruction; evenly chosen from uint8 [N, H, W, 3]."""
    chosen = np.linspace(0, len(pictures) - 1, min(len(pictures), columns * bands)).astype(int)
    rows = []
    for start in range(0, len(chosen), columns):
        originals = pictures[chosen[start : start + columns]]
        for line in (originals, tokenizer.decode(tokenizer.encode(originals))):
            strip = np.concatenate(list(line), axis=1)
            missing = columns * pictures.shape[2] - strip.shape[1]
            rows.append(np.pad(strip, ((0, 2), (0, missing), (0, 0)), constant_values=255))
        rows.append(np.full((6, columns * pictures.shape[2], 3), 128, np.uint8))
    Image.fromarray(np.concatenate(rows)).save(path)
