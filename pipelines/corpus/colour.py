"""Colours of any picture to opaque 8-bit sRGB.

Enters: an upright or turned strip of a picture in any mode that Pillow decodes to. Leaves: the same strip in mode RGB.
Always holds: what a pixel becomes depends on that pixel, the picture's colour profile and the background alone, so
pictures may be converted strip by strip.

A profile is applied where it is whole and of the picture's kind of colour, by LittleCMS with the perceptual intent; else the
values are taken as sRGB, as browsers do. One that changes no colour by more than `SAME_WITHIN` counts as sRGB itself.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from pipelines.corpus.errors import MediaError

Colour = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""

WHITE: Colour = (255, 255, 255)

SAME_WITHIN = 2
"""Of 255. The sRGB profiles that cameras and programs embed differ by so much from one another."""

_PROFILED = {"1": "", "L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
"""The kind of colour that a profile must be of, by the picture's mode without its transparency."""


def opaque_srgb(image: Image.Image, uri: str, background: Colour) -> Image.Image:
    """An 8-bit sRGB picture without transparency.

    Raises:
        MediaError: samples of unknown range, or colours that are not read here.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image, uri, background)
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode in ("1", "L", "RGB") and image.has_transparency_data:
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    elif image.mode in ("YCbCr", "RGBX"):
        image = image.convert("RGB")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha:
        image = image.convert("L") if image.mode == "LA" else Image.merge("RGB", image.split()[:3])
    if image.mode not in _PROFILED:
        raise MediaError(f"{uri}: colours of mode {image.mode} are not read here; convert it to RGB", "unknown colours")
    kind = _PROFILED[image.mode]
    transform = _transform(profile, image.mode, kind) if kind and isinstance(profile, bytes) and profile else None
    image = _applied(transform, image) if transform else image
    image = image.convert("RGB") if image.mode != "RGB" else image
    return Image.composite(image, Image.new("RGB", image.size, background), alpha) if alpha else image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str, kind: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where there is nothing to do, or the profile is of no use."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != kind:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        samples = _samples(mode)
        if samples is None:
            return transform
        turned = _applied(transform, samples)
    except (ImageCms.PyCMSError, OSError):
        return None
    difference = np.asarray(turned).astype(int) - np.asarray(samples.convert("RGB"))
    return None if np.abs(difference).max() <= SAME_WITHIN else transform


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    turned = ImageCms.applyTransform(image, transform)
    assert turned is not None, "only a transform in place returns nothing"
    return turned


def _samples(mode: str) -> Image.Image | None:
    """Colours from all over the space, as a picture; none of inks, which are never sRGB."""
    if mode == "CMYK":
        return None
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3))


def _eight_bit(image: Image.Image, uri: str, background: Colour) -> Image.Image:
    """Greyscale of 16-bit integers or of floats in [0, 1] as 8-bit colours, its transparent value as the background.

    Pillow's own conversion clips 16-bit values at 255, which turns nearly every such picture white.
    """
    samples = np.asarray(image)
    full_scale = 1.0 if image.mode == "F" else 65535.0
    low, high = float(samples.min()), float(samples.max())
    # A NaN fails both comparisons.
    if not (low >= 0 and high <= full_scale):
        raise MediaError(
            f"{uri}: samples of mode {image.mode} from {low:g} to {high:g}; only 0 to {full_scale:g} has a known meaning "
            "as brightness.",
            "unknown range",
        )
    grey = Image.fromarray(np.round(samples.astype(np.float64) * (255.0 / full_scale)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    mask = Image.fromarray(samples == transparent)
    return Image.composite(Image.new("RGB", grey.size, background), grey.convert("RGB"), mask)
