"""Raw bytes to RGB pixels, and pixels to the size that an image tokenizer takes.

What enters: the bytes of one picture file. What leaves: uint8 [H, W, 3] in sRGB, upright, opaque. What always holds:
the result depends on the bytes, the background and `PICTURE_PREPROCESSING_VERSION` alone, and whatever cannot be a picture
is refused with a `MediaError` that names the source. Memory is bounded by `MAX_PIXELS`: see docs/preprocessing.md.
"""

import io
import math
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipelines.corpus.buckets import buckets, nearest
from pipelines.corpus.colour import WHITE, Colour, opaque_srgb
from pipelines.corpus.errors import MediaError

PICTURE_PREPROCESSING_VERSION = 2
"""Raise it when the same bytes may give other pixels: it enters the fingerprint of every dataset."""

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded."""

_STRIP_PIXELS = 2**20
"""Colours are converted by strips of about so many pixels: a whole picture would stand in memory several times."""

# Named, because Pillow would otherwise try every decoder it has on hostile bytes, one of which runs Ghostscript,
# and one of which (TGA) has no magic number and takes arbitrary bytes for a picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# Pillow warns of damaged metadata, which leaves the pixels whole, and of sizes that are an error here. Set once for
# the process: `warnings.catch_warnings` is not safe in the threads that read pictures.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Holds also within icons, which hold pictures of other formats.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

Pixels = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""


def load_picture(data: bytes, uri: str, background: Colour = WHITE, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode one picture: EXIF orientation applied, transparency laid on a colour, the first frame of an animation.

    Palettes, CMYK, greyscale and 16-bit samples become 8-bit sRGB, by the picture's colour profile if it has one. Where
    EXIF is damaged, the pixels stand as stored; where the profile is, their values are taken as sRGB.

    Args:
        data: The whole file.
        uri: Where it came from, for error messages.
        background: What shows through transparent pixels.
        max_pixels: A larger picture is refused by its header, before it is decoded; at most `MAX_PIXELS`.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        MediaError: empty, truncated, of an unknown format, over `max_pixels`, or of samples without a known meaning.
    """
    if not data:
        raise MediaError(f"{uri}: empty file, expected a picture.", "empty file")
    # What a decoder raises on damaged bytes is not a closed list (OSError, SyntaxError, struct.error, IndexError
    # and more have been seen), and whichever it is, this file is the one at fault.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, uri, max_pixels)
        image.load()
        # An icon holds a picture of another format, whose own size is known only now.
        _check_size(image, uri, max_pixels)
        return _pixels(image, uri, background)
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        raise MediaError(f"{uri}: over the limit of {MAX_PIXELS:,} pixels: {fault}", "too many pixels") from fault
    except Image.UnidentifiedImageError as fault:
        known = ", ".join(FORMATS)
        message = f"{uri}: {len(data):,} bytes in no known picture format (known: {known})."
        raise MediaError(message, "unknown format") from fault
    except MemoryError:
        raise
    except Exception as fault:
        message = f"{uri}: damaged picture of {len(data):,} bytes: {type(fault).__name__}: {fault}"
        raise MediaError(message, "damaged") from fault


def fit_picture(
    pixels: Pixels,
    size: int | tuple[int, int],
    *,
    multiple: int,
    mode: Literal["pad", "crop"] = "pad",
    background: Colour = WHITE,
) -> Pixels:
    """Scale a picture, antialiased and in its own proportions, to exactly the wanted size.

    Args:
        pixels: uint8 [H, W, 3].
        size: (height, width) in pixels, or one side of a square.
        multiple: The tokenizer's downsampling factor, which must divide both.
        mode: "pad" shows the whole picture centred on the background; "crop" fills the size and cuts what sticks out.
        background: What is around a padded picture.

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
    canvas = Image.new("RGB", (width, height), background)
    canvas.paste(image, ((width - scaled[1]) // 2, (height - scaled[0]) // 2))
    return np.array(canvas)


def fit_to_codes(
    pixels: Pixels,
    *,
    rows: int,
    columns: int,
    downsampling: int,
    fit: Literal["pad", "crop", "buckets"],
    background: Colour = WHITE,
) -> Pixels:
    """Scale a picture to what an image tokenizer takes for `rows` x `columns` codes, or with buckets for at most as many.

    Args:
        pixels: uint8 [H, W, 3].
        downsampling: Pixels of one code in each direction.
        fit: "pad" and "crop" as in `fit_picture`; "buckets" crops to the bucket whose aspect is nearest the picture's.
        background: What is around a padded picture.

    Returns:
        uint8 [height, width, 3], height and width multiples of `downsampling`.
    """
    mode: Literal["pad", "crop"] = "pad" if fit == "pad" else "crop"
    if fit == "buckets":
        rows, columns = nearest(buckets(rows, columns), *pixels.shape[:2])
    size = (rows * downsampling, columns * downsampling)
    return fit_picture(pixels, size, multiple=downsampling, mode=mode, background=background)


def _pixels(image: Image.Image, uri: str, background: Colour) -> Pixels:
    """The decoded picture in opaque sRGB, turned as its EXIF orientation says."""
    orientation = _orientation(image)
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    stored = _as_stored(pixels, orientation)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image if bottom - top == height else image.crop((0, top, width, bottom))
        stored[top:bottom] = np.asarray(opaque_srgb(strip, uri, background))
    return pixels


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 is upright, and so is what has no orientation, or none that means anything."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # As with damaged pixels the list is not closed, but here the pixels are whole, and viewers show them as stored.
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _as_stored(upright: Pixels, orientation: int) -> Pixels:
    """A view of an upright picture with rows and columns as a file of this EXIF orientation has them."""
    # From 5 on, rows are stored as columns.
    if orientation >= 5:
        upright = upright.transpose(1, 0, 2)
    down = -1 if orientation in (3, 4, 6, 7) else 1
    across = -1 if orientation in (2, 3, 7, 8) else 1
    return upright[::down, ::across]


def _check_size(image: Image.Image, uri: str, max_pixels: int) -> None:
    if math.prod(image.size) > max_pixels:
        message = f"{uri}: {image.width} x {image.height} pixels, over the limit of {max_pixels:,}. Scale it down."
        raise MediaError(message, "too many pixels")
