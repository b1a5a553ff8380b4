"""Raw bytes to RGB pixels, and pixels to a tokenizer's size."""

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import MAX_PIXELS, Pixels, fit_picture, load_picture

# Pytest sets the warning filters anew; that Braid's own hold is tested in a process apart.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

URI = "tar://cats.tar/7.png"
RANDOM = np.random.default_rng(20)
COLOURS: Pixels = RANDOM.integers(0, 256, (9, 14, 3), dtype=np.uint8)


def _file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def _smooth(rows: int, columns: int) -> Pixels:
    """A picture that lossy formats keep within a few levels."""
    down, right = np.mgrid[0:rows, 0:columns]
    return np.stack([down * 255 // rows, right * 255 // columns, (down + right) * 255 // (rows + columns)], 2).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    ("kind", "how"),
    [("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_the_stored_pixels(kind: str, how: dict[str, Any]) -> None:
    pixels = load_picture(_file(Image.fromarray(COLOURS), kind, **how), URI)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, COLOURS)


def test_lossy_formats_give_nearly_the_pixels() -> None:
    picture = _smooth(48, 64)
    for kind in ("JPEG", "WEBP"):
        found = load_picture(_file(Image.fromarray(picture), kind, quality=95), URI)
        assert np.abs(found.astype(int) - picture).mean() < 4, kind


def test_transparency_is_laid_on_white() -> None:
    alpha = RANDOM.integers(0, 256, (9, 14, 1), dtype=np.uint8)
    found = load_picture(_file(Image.fromarray(np.concatenate([COLOURS, alpha], axis=2))), URI)
    share = alpha / 255
    np.testing.assert_allclose(found, COLOURS * share + 255 * (1 - share), atol=1)


def test_transparent_palette_entries_become_white_and_the_others_their_colour() -> None:
    palette = RANDOM.integers(0, 255, (5, 3), dtype=np.uint8)
    indices = RANDOM.integers(0, 5, (9, 14), dtype=np.uint8)
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    shown = palette.copy()
    shown[2] = 255
    for how in ({"transparency": 2}, {"transparency": bytes([255, 255, 0, 255, 255])}):
        np.testing.assert_array_equal(load_picture(_file(image, **how), URI), shown[indices])


def test_cmyk_jpeg_becomes_rgb() -> None:
    rgb = _smooth(48, 64)
    found = load_picture(_file(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), URI)
    assert np.abs(found.astype(int) - rgb).mean() < 4


def test_16_bit_grey_keeps_its_brightness_and_its_transparent_value_turns_white() -> None:
    samples = RANDOM.integers(0, 65536, (9, 14), dtype=np.uint16)
    samples[3, 4] = 1000
    grey = np.round(samples / 257).astype(np.uint8)
    np.testing.assert_array_equal(load_picture(_file(Image.fromarray(samples)), URI), np.repeat(grey[..., None], 3, 2))
    found = load_picture(_file(Image.fromarray(samples), transparency=1000), URI)
    assert (found[3, 4] == 255).all()
    assert (found[samples != 1000] == grey[samples != 1000][:, None]).all()


def test_samples_of_unknown_range_are_refused() -> None:
    for samples in (np.full((4, 5), 70_000, np.int32), np.full((4, 5), 1.5, np.float32)):
        with pytest.raises(MediaError, match=r"7\.png: samples of mode [IF] .* known meaning as brightness"):
            load_picture(_file(Image.fromarray(samples), "TIFF"), URI)


def test_1_bit_pictures_are_black_and_white() -> None:
    bits = RANDOM.integers(0, 2, (9, 14), dtype=np.uint8) * 255
    np.testing.assert_array_equal(
        load_picture(_file(Image.fromarray(bits).convert("1")), URI), np.repeat(bits[..., None], 3, 2)
    )


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (14, 9), colour) for colour in ("red", "lime", "blue")]
    for kind, how in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = _file(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **how)
        found = load_picture(data, URI)
        assert found.shape == (9, 14, 3)
        assert (found == (255, 0, 0)).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    # What a camera held this way stores, so that upright it is COLOURS again.
    stored = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, 1),
        7: np.rot90(COLOURS, 2).transpose(1, 0, 2),
        8: np.rot90(COLOURS, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(load_picture(data, URI), COLOURS)


def _damaged_exif() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description long enough to lie apart", 1
    whole, entry = exif.tobytes(), b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0"
    return {
        "no_header": b"Exif\0\0garbage!!",
        "cut": whole[:-8],
        "cut_in_a_tag": whole[:20],
        "offset_outside": b"Exif\0\0II\x2a\0\xff\xff\xff\x7f",
        "orientation_of_text": entry + struct.pack("<HHI4s", 0x0112, 2, 4, b"abc\0") + b"\0\0\0\0",
        "orientation_99": entry + struct.pack("<HHIHH", 0x0112, 3, 1, 99, 0) + b"\0\0\0\0",
    }


@pytest.mark.parametrize("damage", _damaged_exif())
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_exif_leaves_the_pixels_as_stored(kind: str, damage: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    data = _file(Image.fromarray(COLOURS), kind, exif=_damaged_exif()[damage], **how)
    np.testing.assert_array_equal(load_picture(data, URI), COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_pictures_are_refused_wherever_they_are_cut(kind: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    data = _file(Image.fromarray(noise), kind)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(MediaError, match=r"^tar://cats\.tar/7\.png: .*(damaged|no known picture format)"):
            load_picture(data[: int(len(data) * share)], URI)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"This is text, whatever its name says.\n", "no known picture format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known picture format"),
        (b"\x89PNG\r\n\x1a\n", "damaged|no known picture format"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_source_and_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=rf"^tar://cats\.tar/7\.png: .*({reason})"):
        load_picture(data, URI)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_gives_pixels_or_a_media_error_and_nothing_else(place: int, value: int) -> None:
    data = bytearray(_file(Image.fromarray(COLOURS), ("PNG", "JPEG", "GIF", "TIFF")[place % 4]))
    data[place % len(data)] = value
    try:
        pixels = load_picture(bytes(data), URI)
    except MediaError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)


def _png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header states any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Just over our limit, where Pillow would only warn, and where Pillow refuses too.
@pytest.mark.parametrize("side", [8_945, 10_000, 60_000])
@pytest.mark.filterwarnings("ignore")
def test_a_pixel_bomb_is_refused_by_its_header(side: int) -> None:
    assert side * side > MAX_PIXELS
    with pytest.raises(MediaError, match=r"^tar://cats\.tar/7\.png: .*over the limit of 80,000,000"):
        load_picture(_png_that_claims(side, side), URI)


def test_nothing_is_printed_about_bombs_and_damaged_metadata() -> None:
    bomb = _png_that_claims(10_000, 10_000)
    metadata = [_file(Image.fromarray(COLOURS), exif=exif) for exif in _damaged_exif().values()]
    program = f"""
from pipelines.corpus.pictures import MediaError, load_picture
for data in {metadata!r}:
    load_picture(data, "x")
try:
    load_picture({bomb!r}, "x")
except MediaError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("refused\n", "")


sides = st.integers(1, 70)


@given(sides, sides, st.integers(1, 6), st.integers(1, 6), st.sampled_from(["pad", "crop"]))
@settings(deadline=None)
def test_fit_picture_gives_exactly_the_wanted_size(rows: int, columns: int, down: int, across: int, mode: Any) -> None:
    pixels = np.random.default_rng(rows * 71 + columns).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    fitted = fit_picture(pixels, (8 * down, 8 * across), multiple=8, mode=mode)
    assert fitted.shape == (8 * down, 8 * across, 3)
    assert fitted.dtype == np.uint8


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_picture_of_the_wanted_size_is_unchanged(mode: Any) -> None:
    fitted = fit_picture(COLOURS, COLOURS.shape[:2], multiple=1, mode=mode)
    np.testing.assert_array_equal(fitted, COLOURS)
    assert not np.shares_memory(fitted, COLOURS)


def test_pad_shows_the_whole_picture_centred_on_white_in_its_proportions() -> None:
    fitted = fit_picture(np.full((40, 80, 3), (200, 30, 60), np.uint8), 64, multiple=16)
    assert (fitted[16:48] == (200, 30, 60)).all()
    assert (fitted[:16] == 255).all()
    assert (fitted[48:] == 255).all()


def test_crop_fills_the_size_with_the_middle_of_the_picture_in_its_proportions() -> None:
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = (200, 30, 60)
    picture[10:30, 50:70] = (10, 220, 90)
    fitted = fit_picture(picture, 80, multiple=16, mode="crop")
    # The middle 40 x 40, twice as large: its square of 20 is one of 40 now, as wide as high. Lanczos rings at edges.
    inside = np.abs(fitted.astype(int) - (10, 220, 90)).max(axis=2) < 60
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    assert (rows[[0, -1]].tolist(), columns[[0, -1]].tolist()) == ([20, 59], [20, 59])
    np.testing.assert_allclose(fitted[4:14, 4:76].reshape(-1, 3), np.full((720, 3), (200, 30, 60)), atol=25)


def test_crop_of_a_banner_stays_small() -> None:
    banner = np.tile(COLOURS[:1, :10], (1, 20_000, 1))
    assert fit_picture(banner, 512, multiple=16, mode="crop").shape == (512, 512, 3)
    assert fit_picture(banner, 512, multiple=16).shape == (512, 512, 3)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_scaling_down_is_antialiased(mode: Any) -> None:
    checks = np.repeat((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    fitted = fit_picture(checks, 32, multiple=16, mode=mode).astype(int)
    assert np.abs(fitted[2:-2, 2:-2] - 127).max() <= 2


@pytest.mark.parametrize("size", [0, 8, 40, (32, 40), (-16, 32)])
def test_fit_picture_refuses_a_size_that_is_no_multiple(size: Any) -> None:
    with pytest.raises(ValueError, match="no positive multiple of 16"):
        fit_picture(COLOURS, size, multiple=16)


@pytest.mark.parametrize(
    "pixels", [COLOURS[..., 0], COLOURS[..., :2], COLOURS.astype(np.float32), COLOURS[:0]], ids=lambda p: str(p.shape)
)
def test_fit_picture_refuses_what_is_no_rgb_picture(pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\], found"):
        fit_picture(pixels, 32, multiple=16)
