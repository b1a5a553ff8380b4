"""Colours: profiles are applied, transparency is laid on the background, every mode becomes sRGB."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.corpus import pictures
from pipelines.corpus.colour import opaque_srgb
from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import Pixels, load_picture

RANDOM = np.random.default_rng(5)
COLOURS: Pixels = RANDOM.integers(0, 256, (30, 20, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def _profile(gamma: float, kind: bytes = b"RGB ", *, swap: bool = False) -> bytes:
    """A profile of sRGB's primaries (red and green swapped, if so asked) with another gamma, one of greys, or of inks."""
    xyz = {b"rXYZ": (0.4361, 0.2225, 0.0139), b"gXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7141)}
    if swap:
        xyz[b"rXYZ"], xyz[b"gXYZ"] = xyz[b"gXYZ"], xyz[b"rXYZ"]

    def fixed(number: float) -> bytes:
        return round(number * 65536).to_bytes(4, "big", signed=True)

    curve = b"para" + bytes(4) + bytes(4) + fixed(gamma)
    text = b"desc" + bytes(4) + (2).to_bytes(4, "big") + b"x\0" + bytes(78)
    tags = {b"desc": text, b"wtpt": b"XYZ " + bytes(4) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))}
    if kind == b"GRAY":
        tags[b"kTRC"] = curve
    elif kind == b"CMYK":
        ramp = bytes(range(256))
        # Two levels a channel; only the black ink, which varies fastest, makes darker.
        lab = b"".join(bytes((0 if corner % 2 else 255, 128, 128)) for corner in range(16))
        identity = b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
        tags[b"A2B0"] = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + lab + ramp * 3
    else:
        tags |= {name: b"XYZ " + bytes(4) + b"".join(map(fixed, values)) for name, values in xyz.items()}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + (start + len(body)).to_bytes(4, "big") + len(value).to_bytes(4, "big")
        body += value
    size = start + len(body)
    what = b"prtrCMYKLab " if kind == b"CMYK" else b"mntr" + kind + b"XYZ "
    header = size.to_bytes(4, "big") + bytes(4) + b"\x02\x40\0\0" + what + bytes(12) + b"acsp"
    header += bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return header.ljust(128, b"\0") + len(tags).to_bytes(4, "big") + table + body


def _linear_to_srgb(values: np.ndarray) -> np.ndarray:
    share = values / 255
    return 255 * np.where(share <= 0.0031308, 12.92 * share, 1.055 * share ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_profile_of_linear_light_is_applied(kind: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    found = load_picture(_file(Image.fromarray(COLOURS), kind, icc_profile=_profile(1.0), **how), "x")
    np.testing.assert_allclose(found, _linear_to_srgb(COLOURS.astype(float)), atol=3)


def test_a_profile_of_greys_is_applied_to_greys() -> None:
    grey = COLOURS[..., 0]
    found = load_picture(_file(Image.fromarray(grey), icc_profile=_profile(1.8, b"GRAY")), "x")
    light = 255 * (grey / 255) ** 1.8
    np.testing.assert_allclose(found, np.repeat(_linear_to_srgb(light)[..., None], 3, 2), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_profile_of_inks_is_applied(kind: str) -> None:
    """In this one cyan, magenta and yellow leave the paper white."""
    for ink, colour in (((255, 0, 0, 0), 255), ((0, 255, 255, 0), 255), ((0, 0, 0, 255), 0)):
        found = load_picture(_file(Image.new("CMYK", (16, 16), ink), kind, icc_profile=_profile(1.0, b"CMYK")), "x")
        assert np.abs(found.astype(int) - colour).max() <= 3


def test_a_profile_may_turn_hues() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert load_picture(_file(red, icc_profile=_profile(2.2, swap=True)), "x")[0, 0].argmax() == 1


def test_the_colours_of_a_palette_and_of_a_transparent_picture_follow_the_profile_too() -> None:
    profile = _profile(1.0)
    palette = Image.fromarray(COLOURS).quantize(16)
    expected = _linear_to_srgb(np.asarray(palette.convert("RGB")).astype(float))
    np.testing.assert_allclose(load_picture(_file(palette, icc_profile=profile), "x"), expected, atol=3)
    rgba = Image.fromarray(COLOURS)
    rgba.putalpha(128)
    found = load_picture(_file(rgba, icc_profile=profile), "x", background=(0, 0, 0))
    np.testing.assert_allclose(found, _linear_to_srgb(COLOURS.astype(float)) * 128 / 255, atol=3)


@pytest.mark.parametrize(
    "profile",
    [b"no profile", SRGB[:200], _profile(1.0, b"GRAY"), SRGB, bytes(128)],
    ids=["text", "cut", "of greys", "sRGB", "zeros"],
)
def test_values_stand_where_the_profile_is_damaged_of_another_kind_or_srgb_itself(profile: bytes) -> None:
    np.testing.assert_array_equal(load_picture(_file(Image.fromarray(COLOURS), icc_profile=profile), "x"), COLOURS)


def test_strips_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = Image.fromarray(COLOURS)
    rgba.putalpha(Image.fromarray(COLOURS[..., 1]))
    exif = Image.Exif()
    grey = Image.fromarray(RANDOM.integers(0, 65536, (30, 20), dtype=np.uint16))
    for image in (rgba, rgba.quantize(20), grey, rgba.convert("CMYK")):
        for orientation in range(1, 9):
            exif[0x0112] = orientation
            data = _file(image, "TIFF" if image.mode == "CMYK" else "PNG", exif=exif)
            monkeypatch.setattr(pictures, "_STRIP_PIXELS", 2**20)
            whole = load_picture(data, "x", background=(9, 8, 7))
            monkeypatch.setattr(pictures, "_STRIP_PIXELS", 70)
            np.testing.assert_array_equal(load_picture(data, "x", background=(9, 8, 7)), whole)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa", "P", "PA"])
def test_every_kind_of_transparency_shows_the_background(mode: str) -> None:
    image = Image.fromarray(COLOURS)
    image.putalpha(Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 15)[:, None].repeat(20, axis=1)))
    opaque = np.asarray(image.convert("L" if mode[0] == "L" else "RGB").convert("RGB"))
    steps = {"LA": ["LA"], "La": ["LA", "La"], "RGBa": ["RGBa"], "P": ["P"], "PA": ["P", "PA"]}.get(mode, [])
    for step in steps:
        image = image.quantize(255) if step == "P" else image.convert(step)
    assert image.mode == mode
    found = np.asarray(opaque_srgb(image, "x", (10, 20, 30)))
    assert (found[:15] == (10, 20, 30)).all()
    if mode[0] != "P":
        np.testing.assert_allclose(found[15:], opaque[15:], atol=1)


def test_a_transparent_value_of_1_bit_and_of_16_bit_greys_shows_the_background() -> None:
    bits = Image.fromarray(COLOURS[..., 0]).convert("1")
    shown = np.asarray(bits)
    found = load_picture(_file(bits, transparency=255), "x", background=(10, 20, 30))
    assert (found[shown] == (10, 20, 30)).all()
    assert (found[~shown] == 0).all()


def test_colours_of_a_kind_that_is_not_read_are_named() -> None:
    with pytest.raises(MediaError, match="x: colours of mode LAB are not read here") as caught:
        load_picture(_file(Image.new("LAB", (4, 4)), "TIFF"), "x")
    assert caught.value.fault == "unknown colours"
