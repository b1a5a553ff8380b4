"""The sheet of an image tokenizer: pictures beside what is left of them."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import Pixels, fit_picture, load_picture
from pipelines.report.frame import Section
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.media import data_uri
from pipelines.report.parts import coverage_chart, key_figures, section
from pipelines.tokenizers.image_data import SUFFIXES
from pipelines.tokenizers.image_evaluation import Comparison, compare, summary
from pipelines.tokenizers.sheet import CheckError, Request, spread
from pipelines.tokenizers.vqgan import ImageTokenizer

BATCH = 8
DIFFERENCE_GAIN = 4


def sections(request: Request) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of the sheet."""
    tokenizer = ImageTokenizer.load(request.tokenizer, request.device)
    names, pictures, refused, found = _pictures(request, tokenizer)
    comparison = compare(
        tokenizer, pictures, BATCH, lambda done: request.watch("encoding and decoding", done, len(pictures))
    )
    side, size = tokenizer.downsampling, tokenizer.config.resolution
    subtitle = (
        f"image tokenizer · {side} x {side} pixels a code · {tokenizer.codebook_size:,} codes · {len(pictures):,} of "
        f"{found:,} pictures of {request.data.name} at {size} x {size}"
    )
    made = [
        section("figures", "Figures", _figures(comparison, refused)),
        section("codes", "Use of the codes", _codes(comparison)),
        section("pictures", "Pictures", _shown(comparison, names, request.items)),
    ]
    return tokenizer.name, subtitle, made


def _pictures(request: Request, tokenizer: ImageTokenizer) -> tuple[list[str], Pixels, list[str], int]:
    """Names and pixels of the pictures to look at, why others were left out, and how many files there are."""
    root = request.data
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES) if root.is_dir() else [root]
    names, pictures, refused = [], [], []
    chosen = spread(paths, request.limit)
    for done, path in enumerate(chosen, 1):
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            pixels = load_picture(path.read_bytes(), name)
            pictures.append(fit_picture(pixels, tokenizer.config.resolution, multiple=tokenizer.downsampling))
            names.append(name)
        except MediaError as fault:
            refused.append(str(fault))
        request.watch("reading", done, len(chosen))
    if not pictures:
        why = f"; {refused[0]}" if refused else ""
        raise CheckError(
            f"{root}: none of {len(paths):,} picture files can be shown ({', '.join(sorted(SUFFIXES))}){why}"
        )
    return names, np.stack(pictures), refused, len(paths)


def _figures(comparison: Comparison, refused: list[str]) -> Markup:
    figures = summary(comparison)
    rows = [
        (name, *(f"{value:{form}}" for value in np.quantile(comparison.figures[key].numpy(), (0, 0.1, 0.5, 0.9, 1))))
        for name, key, form in (
            ("PSNR, dB", "psnr_db", ".2f"),
            ("SSIM", "ssim", ".4f"),
            ("L1 of 255", "l1_of_255", ".2f"),
        )
    ]
    if figures["coloured_pictures"]:
        colour = (
            f"Over the {figures['coloured_pictures']:,} pictures with colour, its mean error is "
            f"{figures['chroma_error']:.2f} of 255; copies without any colour have {figures['chroma_error_of_grey']:.2f}. "
        )
    else:
        colour = "No picture has colour. "
    left_out = f" Left out: {len(refused):,} files, the first: {refused[0]}" if refused else ""
    return join(
        [
            key_figures(
                (f"{figures['psnr_db']:.2f} dB", "PSNR, the mean over pictures"),
                (f"{figures['ssim']:.4f}", "SSIM, 1 is alike"),
                (f"{figures['relative_sharpness']:.2f}", "sharpness of the original's"),
                (f"{figures['codes_used']:,}", f"of {figures['codebook_size']:,} codes used"),
                (f"{figures['perplexity']:,.0f}", "perplexity: codes in effective use"),
            ),
            table("Over the pictures", ("", "worst", "10%", "median", "90%", "best"), _ordered(rows)),
            tag(
                "p", f"{colour}Sharpness 1 has as many edges as the original, less is blurred.{left_out}", class_="note"
            ),
        ]
    )


def _ordered(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows of quantiles from the worst to the best; of L1 the largest is the worst."""
    return [row if not row[0].startswith("L1") else (row[0], *row[:0:-1]) for row in rows]


def _codes(comparison: Comparison) -> Markup:
    counts = comparison.counts
    used = int((counts > 0).sum())
    total = int(counts.sum())
    rows = [
        ("codes in the codebook", f"{len(counts):,}"),
        ("used at least once", f"{used:,} ({used / len(counts):.1%})"),
        ("dead: not used in these pictures", f"{len(counts) - used:,} ({1 - used / len(counts):.1%})"),
        ("perplexity", f"{summary(comparison)['perplexity']:,.1f}"),
        ("the most used code's share", f"{counts.max() / total:.2%}"),
        ("codes of these pictures", f"{total:,}"),
    ]
    few = total < 20 * len(counts)
    note = "Few pictures leave codes unused that are not dead: give more with --limit." if few else ""
    chart = coverage_chart("coverage", "What the most used codes cover", [("codes", counts)], tone="image")
    return join(
        [
            tag("div", chart, table("Codes", ("", ""), rows), class_="panels"),
            tag("p", note, class_="note") if note else None,
        ]
    )


def _shown(comparison: Comparison, names: list[str], items: int) -> Markup:
    order = np.argsort(comparison.figures["psnr_db"].numpy(), kind="stable").tolist()
    cards = []
    for place in spread(range(len(order)), items):
        index = order[place]
        before, after = comparison.originals[index], comparison.reconstructions[index]
        error = np.abs(before.astype(int) - after.astype(int)) * DIFFERENCE_GAIN
        parts = (
            ("original", before),
            ("from its codes", after),
            (f"difference x {DIFFERENCE_GAIN}", 255 - error.clip(0, 255).astype(np.uint8)),
        )
        told = f"PSNR {comparison.figures['psnr_db'][index]:.2f} dB · SSIM {comparison.figures['ssim'][index]:.4f}"
        cards.append(
            tag(
                "figure",
                tag(
                    "div",
                    *(
                        tag("div", _picture(pixels, f"{names[index]}, {what}"), tag("span", what))
                        for what, pixels in parts
                    ),
                    class_="pair",
                ),
                tag("figcaption", tag("p", told, class_="numbers"), tag("p", names[index], class_="settings")),
                class_="card",
            )
        )
    return join(
        [
            tag("p", "From the worst PSNR to the best, evenly chosen; white in the difference is none.", class_="note"),
            tag("div", *cards, class_="cards pairs"),
        ]
    )


def _picture(pixels: Pixels, alternative: str) -> Markup:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG", optimize=True)
    return tag("img", src=data_uri("image/png", sink.getvalue()), alt=alternative, loading="lazy")
