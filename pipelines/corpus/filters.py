"""Filters of a source: which of its documents are wanted.

Enters: a document, or a decoded picture or sound. Leaves: the name of the filter that drops it, or None. Always holds:
what is dropped depends on the document and the settings alone, and every drop is counted under its filter's name.
"""

from __future__ import annotations

import hashlib
from typing import Self

from pydantic import Field, model_validator

from pipelines.corpus.documents import Document
from pipelines.recipe import Settings
from pipelines.sequence import Modality


class Filters(Settings):
    """Limits that a document must keep, all of them; a document of several pictures or sounds with each of them."""

    min_characters: int | None = Field(None, ge=1)
    """Of all text of the document together; documents without text pass."""
    max_characters: int | None = Field(None, ge=1)
    languages: tuple[str, ...] | None = Field(None, min_length=1)
    """Tags to keep. `en` keeps `en-GB` too; a document without a tag is dropped."""
    min_pixels: int | None = Field(None, ge=1)
    """Of a picture's shorter side, before it is scaled."""
    max_aspect: float | None = Field(None, ge=1)
    """Longer side over shorter side."""
    min_seconds: float | None = Field(None, gt=0)
    max_seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for unit in ("characters", "seconds"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} {low} exceeds max_{unit} {high}: no document would pass")
        return self

    def drops(self, document: Document) -> str | None:
        """The filter that a document fails by its text or language, before anything is decoded."""
        if self.languages is not None and not any(_speaks(document.language, tag) for tag in self.languages):
            return "languages"
        if self.min_characters is None and self.max_characters is None:
            return None
        texts = [span.text for span in document.spans if span.modality is Modality.TEXT and span.codes is None]
        characters = sum(len(text) for text in texts)
        if texts and self.min_characters is not None and characters < self.min_characters:
            return "min_characters"
        if texts and self.max_characters is not None and characters > self.max_characters:
            return "max_characters"
        return None

    def drops_picture(self, height: int, width: int) -> str | None:
        """The filter that a picture of so many pixels fails."""
        short, long = sorted((height, width))
        if self.min_pixels is not None and short < self.min_pixels:
            return "min_pixels"
        return "max_aspect" if self.max_aspect is not None and long > self.max_aspect * short else None

    def drops_sound(self, seconds: float) -> str | None:
        """The filter that a sound of this length fails."""
        if self.min_seconds is not None and seconds < self.min_seconds:
            return "min_seconds"
        return "max_seconds" if self.max_seconds is not None and seconds > self.max_seconds else None


def draw(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone: neither on the order of the work nor on the number of workers."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _speaks(tag: str, wanted: str) -> bool:
    tag, wanted = tag.lower().replace("_", "-"), wanted.lower().replace("_", "-")
    return tag == wanted or tag.startswith(f"{wanted}-")
