"""Generated samples as files: text, PNG and WAV, each with a record of how it was made.

    a-red-apple-seed0-0.png         what was generated
    a-red-apple-seed0-0.png.json    prompt, seed, settings, checkpoint, fingerprint, tokens

The name of a long prompt is cut, and ends in a hash of the whole.

The record, without the tokens, also stands in the PNG's text chunk and in the WAV's INFO comment.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.decode import DecodedSpan
from pipelines.interleave import Sequence

RECORD_VERSION = 1
"""Raised when the record beside a sample changes its layout."""

SLUG_CHARACTERS = 40
"""Of a prompt, in the name of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One generated continuation."""

    index: int
    """Among the samples of its prompt."""
    prompt: list[dict[str, str]]
    """The items of the prompt, `{modality: text or file}` each."""
    sequence: Sequence
    """The whole document, prompt included."""
    prompt_tokens: int
    truncated: bool
    """Whether a text was cut at `max_tokens` or at the end of the context, rather than ended by the model."""
    spans: list[DecodedSpan]
    """The generated spans, in the order in which they were wanted."""
    files: tuple[Path, ...] = ()
    """Where `write` put the spans."""

    @property
    def text(self) -> str:
        """The generated texts, one a line."""
        return "\n".join(span.text for span in self.spans if span.text is not None)


def write(samples: Iterable[Sample], out: str | Path, settings: Mapping[str, Any]) -> list[Sample]:
    """Write every generated span and its record below a folder; equal names are overwritten.

    Args:
        settings: JSON values, as `Generator.settings` gives them; `seed` becomes part of the names.

    Returns:
        The samples, each with its `files`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sample in samples:
        stem = f"{_slug(sample.prompt)}-seed{settings['seed']}-{sample.index}"
        several = len(sample.spans) > 1
        files = []
        for number, span in enumerate(sample.spans):
            file = folder / f"{stem}{f'-{number}' if several else ''}{span.suffix}"
            about = _about(sample, number, settings)
            file.write_bytes(to_bytes(span, about))
            record = about | {"tokens": _tokens(sample)}
            file.with_name(f"{file.name}.json").write_text(json.dumps(record, ensure_ascii=False) + "\n", "utf-8")
            files.append(file)
        written.append(replace(sample, files=tuple(files)))
    return written


def to_bytes(span: DecodedSpan, about: Mapping[str, Any]) -> bytes:
    """A span as a file that carries its record, where the format has a place for it."""
    record, title = json.dumps(about, ensure_ascii=False), _title(about["prompt"])
    sink = io.BytesIO()
    if span.pixels is not None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        for key, value in (("Software", "Braid"), ("Description", title), ("braid", record)):
            chunks.add_text(key, value)
        Image.fromarray(span.pixels).save(sink, format="PNG", pnginfo=chunks)
    elif span.waveform is not None:
        import soundfile

        with soundfile.SoundFile(sink, "w", span.sample_rate_hz, 1, "PCM_16", format="WAV") as file:
            file.software, file.title, file.comment = "Braid", title, record
            file.write(np.clip(span.waveform, -1, 1))
    else:
        return span.to_bytes()
    return sink.getvalue()


def _about(sample: Sample, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "record_version": RECORD_VERSION,
        "prompt": sample.prompt,
        "sample": sample.index,
        "span": number,
        "modality": sample.spans[number].modality.label,
        "truncated": sample.truncated,
        **settings,
    }


def _tokens(sample: Sample) -> dict[str, Any]:
    """The whole document, which `pipelines.sequence.parse` reads."""
    return {
        "prompt_tokens": sample.prompt_tokens,
        "token_ids": sample.sequence.token_ids.tolist(),
        "modality_ids": sample.sequence.modality_ids.tolist(),
        "spans": [asdict(span) | {"modality": span.modality.label} for span in sample.sequence.spans],
    }


def _title(prompt: list[dict[str, str]]) -> str:
    return " + ".join(" ".join(text.split()) for item in prompt for text in item.values()) or "no prompt"


def _slug(prompt: list[dict[str, str]]) -> str:
    words = [Path(text).stem if modality != "text" else text for item in prompt for modality, text in item.items()]
    slug = re.sub(r"\W+", "-", " ".join(words).lower()).strip("-")
    if len(slug) > SLUG_CHARACTERS:
        digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
        return f"{slug[:SLUG_CHARACTERS].rstrip('-')}-{digest[:8]}"
    return slug or "no-prompt"
