"""Raw bytes to RGB pixels, and pixels to the size that an image tokenizer takes.

What enters: the bytes of one picture file. What leaves: uint8 [H, W, 3] in RGB, upright, opaque. What always holds:
the result depends on the bytes and on `PICTURE_PREPROCESSING_VERSION` alone, and whatever cannot be a picture is
refused with a `MediaError` that names the source. Colour profiles are not applied: values are taken as sRGB.
"""

import io
import math
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines.corpus.errors import MediaError

PICTURE_PREPROCESSING_VERSION = 1
"""Raise it when the same bytes may give other pixels: it enters the fingerprint of every dataset."""

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded: 240 MB of RGB is what one worker may be asked to hold."""

# Named, because Pillow would otherwise try every decoder it has on hostile bytes, one of which runs Ghostscript,
# and one of which (TGA) has no magic number and takes arbitrary bytes for a picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# Pillow warns of damaged metadata, which leaves the pixels whole, and of sizes that are an error here. Set once for
# the process: `warnings.catch_warnings` is not safe in the threads that read pictures.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright; 1 is, and other values mean nothing."""

Pixels = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""


def load_picture(data: bytes, uri: str) -> Pixels:
    """Decode one picture: EXIF orientation applied, transparency laid on white, the first frame of an animation.

    Palettes, CMYK, greyscale and 16-bit samples become 8-bit RGB. Where EXIF is damaged, the pixels stand as stored.

    Args:
        data: The whole file.
        uri: Where it came from, for error messages.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        MediaError: empty, truncated, of an unknown format, over `MAX_PIXELS`, or of samples without a known range.
    """
    if not data:
        raise MediaError(f"{uri}: empty file, expected a picture.")
    # What a decoder raises on damaged bytes is not a closed list (OSError, SyntaxError, struct.error, IndexError
    # and more have been seen), and whichever it is, this file is the one at fault.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if math.prod(image.size) > MAX_PIXELS:
            raise MediaError(f"{uri}: {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}.")
        image.load()
        return np.array(_opaque_rgb(_upright(image), uri))
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        raise MediaError(f"{uri}: over the limit of {MAX_PIXELS:,} pixels: {fault}") from fault
    except Image.UnidentifiedImageError as fault:
        known = ", ".join(FORMATS)
        raise MediaError(f"{uri}: {len(data):,} bytes in no known picture format (known: {known}).") from fault
    except MemoryError:
        raise
    except Exception as fault:
        raise MediaError(f"{uri}: damaged picture of {len(data):,} bytes: {type(fault).__name__}: {fault}") from fault


def fit_picture(
    pixels: Pixels, size: int | tuple[int, int], *, multiple: int, mode: Literal["pad", "crop"] = "pad"
) -> Pixels:
    """Scale a picture, antialiased and in its own proportions, to exactly the wanted size.

    Args:
        pixels: uint8 [H, W, 3].
        size: (height, width) in pixels, or one side of a square.
        multiple: The tokenizer's downsampling factor, which must divide both.
        mode: "pad" shows the whole picture centred on white; "crop" fills the size and cuts what sticks out.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: `size` is no positive multiple of `multiple`, or `pixels` is no RGB picture.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise ValueError(f"picture size {height} x {width} is no positive multiple of {multiple} in both directions.")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or pixels.size == 0:
        raise ValueError(f"expected uint8 [H, W, 3], found {pixels.dtype} {list(pixels.shape)}.")
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels.copy()
    image = Image.fromarray(pixels)
    if mode == "crop":
        # Cut and scaled at once: scaled first, a banner of 10 x 20,000 pixels would grow to hundreds of megabytes.
        scale = max(height / rows, width / columns)
        top, left = (rows - height / scale) / 2, (columns - width / scale) / 2
        box = (max(left, 0.0), max(top, 0.0), min(columns - left, columns), min(rows - top, rows))
        return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    scale = min(height / rows, width / columns)
    # At least one pixel of a very flat picture survives.
    scaled = (max(round(rows * scale), 1), max(round(columns * scale), 1))
    if scaled != (rows, columns):
        image = image.resize((scaled[1], scaled[0]), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - scaled[1]) // 2, (height - scaled[0]) // 2))
    return np.array(canvas)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # As with damaged pixels the list is not closed, but here the pixels are whole, and viewers show them as stored.
    except Exception:
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _opaque_rgb(image: Image.Image, uri: str) -> Image.Image:
    """An 8-bit RGB picture without transparency, from whatever Pillow decoded."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image, uri)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image, uri: str) -> Image.Image:
    """Greyscale of 16-bit integers or of floats in [0, 1] as 8-bit greyscale, its transparent value as white.

    Pillow's own conversion clips 16-bit values at 255, which turns nearly every such picture white.
    """
    samples = np.asarray(image).astype(np.float64)
    full_scale = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(samples).all() or samples.min() < 0 or samples.max() > full_scale:
        raise MediaError(
            f"{uri}: samples of mode {image.mode} from {samples.min():g} to {samples.max():g}; "
            f"only 0 to {full_scale:g} has a known meaning as brightness."
        )
    grey = np.round(samples * (255.0 / full_scale)).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey)
