"""Rows of a dataset as cards: what their tokens give, beside what they were made of where that can still be read.

Enters: decoded rows and their originals. Leaves: `Markup` with the media inside: pictures as WebP, sounds as FLAC, which
every browser plays and which loses nothing. Always holds: a card says which is which.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipelines.decode import DecodedSpan
from pipelines.originals import Original, beside
from pipelines.report.charts import waveform
from pipelines.report.markup import Markup, join, tag
from pipelines.report.media import data_uri, prose
from pipelines.sequence import Modality
from pipelines.show import ShownRow

MOST_SPANS = 6
"""Spans of a row that a card shows."""

_LONGEST_SIDE = 256
"""Pixels of a thumbnail."""
_WEBP_QUALITY = 82
_LONGEST_SOUND_S = 20.0


def cards(rows: Sequence[ShownRow], originals: Sequence[Original]) -> Markup:
    """One card a row, in order."""
    return tag("div", *map(_card, rows, originals), class_="cards samples")


def _card(row: ShownRow, original: Original) -> Markup:
    about = " ".join(" ".join((span.text or "").split()) for span in row.spans)[:120] or row.source
    pairs = list(zip(row.spans, beside(row.spans, original.spans), strict=True))
    parts = [_span(span, raw, about) for span, raw in pairs[:MOST_SPANS]]
    left = len(pairs) - len(parts)
    if left > 0:
        parts.append(tag("p", f"and {left:,} more spans", class_="note"))
    media = any(span.modality is not Modality.TEXT for span in row.spans)
    lacking = tag("p", f"Original: {original.missing}", class_="note") if original.missing and media else None
    foot = tag(
        "footer",
        tag("span", row.source, class_="source"),
        tag("code", row.row_id[:12]),
        f" · {row.num_tokens:,} tokens",
    )
    return tag("article", *parts, lacking, foot, class_="card")


def _span(span: DecodedSpan, raw: DecodedSpan | None, about: str) -> Markup:
    if span.text is not None:
        return prose(span.text)
    if span.pixels is not None:
        made = picture(span.pixels, "from tokens", f"Picture decoded from the tokens of: {about}")
        if raw is None or raw.pixels is None:
            return tag("div", made, class_="pair one")
        first = picture(raw.pixels, "original", f"Original picture of: {about}")
        return tag("div", first, made, class_="pair")
    made = player(span, "from tokens", f"Sound decoded from the tokens of: {about}")
    return join([player(raw, "original", f"Original sound of: {about}") if raw is not None else None, made])


def picture(pixels: NDArray[np.uint8], name: str, alternative: str) -> Markup:
    """A picture, uint8 [H, W, 3], with its name below."""
    image = tag(
        "img",
        src=data_uri("image/webp", webp(pixels)),
        alt=alternative,
        width=pixels.shape[1],
        height=pixels.shape[0],
    )
    return tag("figure", image, tag("figcaption", name))


def webp(pixels: NDArray[np.uint8]) -> bytes:
    """A thumbnail of a picture, uint8 [H, W, 3]."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    sink = io.BytesIO()
    image.save(sink, format="WEBP", quality=_WEBP_QUALITY, method=4)
    return sink.getvalue()


def player(span: DecodedSpan, name: str, label: str) -> Markup:
    """A sound with its name, length, waveform and controls."""
    assert span.waveform is not None
    rate = span.sample_rate_hz
    whole = len(span.waveform) / rate
    heard = span.waveform[: int(_LONGEST_SOUND_S * rate)]
    said = f"{whole:.1f} s" if whole <= _LONGEST_SOUND_S else f"first {_LONGEST_SOUND_S:.0f} of {whole:.1f} s"
    controls = tag(
        "audio", controls=True, preload="metadata", src=data_uri("audio/flac", flac(heard, rate)), aria_label=label
    )
    head = tag("span", name, class_="side")
    return tag("div", head, tag("span", said, class_="length"), waveform(heard, rate) if len(heard) else None, controls,
               class_="sound")  # fmt: skip


def flac(samples: NDArray[np.float32], rate: int) -> bytes:
    """A sound, float32 [samples], as 16-bit FLAC."""
    sink = io.BytesIO()
    soundfile.write(sink, np.clip(samples, -1, 1), rate, format="FLAC", subtype="PCM_16")
    return sink.getvalue()
