"""Texts, pictures and sounds as parts of a page that needs no other file.

Enters: decoded spans, or a folder that `pipelines.generate` wrote. Leaves: `Markup` with the media inside, as data URIs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from pipelines.report.charts import waveform
from pipelines.report.markup import Markup, join, tag
from pipelines.sequence import Modality

_KINDS = {".txt": Modality.TEXT, ".png": Modality.IMAGE, ".wav": Modality.AUDIO}

SHORT_TEXT = 300
"""Characters of a text that are shown before one asks for more."""

LONGEST_TEXT = 20_000
"""Characters of a text that a page holds at the most."""


class PageError(ValueError):
    """A page cannot be written; the message names the file and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedFile:
    """One generated text, picture or sound, and how it was made."""

    name: str
    modality: Modality
    content: bytes
    record: Mapping[str, Any]
    """Of `pipelines.generate.output`; empty if there is none beside the file."""

    @property
    def prompt(self) -> list[tuple[str, str]]:
        """(modality, text or name of the file) of what stood before it."""
        return [(kind, value) for item in self.record.get("prompt", []) for kind, value in item.items()]

    @property
    def prompt_text(self) -> str:
        """The prompt on one line; "" for none."""
        return " + ".join(" ".join(v.split()) if kind == "text" else Path(v).name for kind, v in self.prompt)


def read_generated(folder: Path) -> list[GeneratedFile]:
    """All texts, pictures and sounds of a folder, in the order of their names.

    Raises:
        PageError: no such folder, or a record in it that cannot be read.
    """
    if not folder.is_dir():
        raise PageError(f"{folder}: no such folder; name the one that `braid generate --out` wrote, or none")
    files = sorted(path for path in folder.iterdir() if path.suffix in _KINDS and not path.name.startswith("."))
    return [
        GeneratedFile(
            name=path.name, modality=_KINDS[path.suffix], content=path.read_bytes(), record=_read_record(path)
        )
        for path in files
    ]


def _read_record(path: Path) -> Mapping[str, Any]:
    beside = path.with_name(f"{path.name}.json")
    if not beside.exists():
        return {}
    try:
        record = json.loads(beside.read_bytes())
        items = record["prompt"]
        whole = all(isinstance(v, str) for item in items for v in item.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PageError(
            f"{beside}: no record of a generated sample ({error}); generate it again, or remove it"
        ) from error
    if not whole:
        raise PageError(f"{beside}: its prompt is no list of texts and files; generate it again, or remove it")
    return dict(record)


def data_uri(kind: str, content: bytes) -> str:
    """The content itself as an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(png: bytes, alternative: str) -> Markup:
    """A PNG, with a text for those who do not see it."""
    return tag("img", src=data_uri("image/png", png), alt=alternative, class_="picture")


def sound(wav: bytes, label: str) -> Markup:
    """A WAV with its waveform and a player.

    Args:
        label: what the player is called by screen readers.
    """
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    wave = waveform(samples.mean(axis=1), rate) if len(samples) else None
    player = tag("audio", controls=True, preload="metadata", src=data_uri("audio/wav", wav), aria_label=label)
    length = tag("span", f"{len(samples) / rate:.2f} s", class_="length")
    return tag("div", wave, player, length, class_="sound")


def prose(text: str, *, before: str = "") -> Markup:
    """A text; what is long opens on request.

    Args:
        before: a text that this one goes on from; it stands in front, set apart.
    """
    lead = tag("span", before, class_="before") if before else None
    if len(text) <= SHORT_TEXT:
        return tag("p", lead, text, class_="prose", dir="auto")
    cut = text.rfind(" ", SHORT_TEXT // 2, SHORT_TEXT)
    cut = cut if cut > 0 else SHORT_TEXT
    kept = text[:LONGEST_TEXT]
    left_out = f" (the first {len(kept):,})" if len(kept) < len(text) else ""
    return join(
        [
            tag("p", lead, text[:cut], " …", class_="prose", dir="auto"),
            tag(
                "details",
                tag("summary", f"All {len(text):,} characters{left_out}"),
                tag("p", kept, class_="prose", dir="auto"),
            ),
        ]
    )
