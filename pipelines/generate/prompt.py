"""What stands before the generated part: text, pictures and sounds in any order, as tokens.

Enters: a prompt as a person gives it. Leaves: the beginning of a document. Always holds: media go through the same
preprocessing as in the dataset, and text never becomes a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.corpus.documents import RawSpan
from pipelines.corpus.media_types import EXTENSIONS
from pipelines.corpus.pictures import fit_to_codes, load_picture
from pipelines.corpus.sounds import equal_parts, load_sound
from pipelines.generate.errors import GenerateError
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Ids, Modality, ModalityIds, Vocabulary
from pipelines.tokenize.tokenizers import Tokenizers

PromptItem = str | Path | RawSpan | EncodedSpan
"""A text, the path of a media or text file, or a span that is already read or encoded."""

Prompt = PromptItem | Sequence[PromptItem]
"""One item, or several in order. An empty text is no item; no item at all is the prompt of unconditional generation."""

_SPECIAL = re.compile(r"<\|(?:document|end|image|audio|[1-9]|[1-5]\d|6[0-4])\|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """`<|document|>` and the spans of a prompt, the document still open."""

    token_ids: Ids
    modality_ids: ModalityIds
    items: list[dict[str, str]]
    """For the record: `{modality: text, file, or shape of the codes}` each."""


def encode_prompt(prompt: Prompt, vocabulary: Vocabulary, tokenizers: Tokenizers) -> EncodedPrompt:
    """Tokenize a prompt.

    Raises:
        GenerateError: a special token written out in a text, a file that is not there or of no known kind, a medium that
            the vocabulary lacks.
        MediaError: a file that cannot be decoded.
        SequenceError: encoded spans that break the contract, or two texts in a row.
    """
    items = [prompt] if isinstance(prompt, str | Path | RawSpan | EncodedSpan) else list(prompt)
    raw = [_read(item) if isinstance(item, str | Path) else item for item in items]
    raw = [item for item in raw if isinstance(item, EncodedSpan) or item.text or item.data]
    spans = [
        span
        for item in raw
        for span in ([item] if isinstance(item, EncodedSpan) else _encode(item, vocabulary, tokenizers))
    ]
    record = [{item.modality.label: _describe(item)} for item in raw]
    if not spans:
        return EncodedPrompt(
            token_ids=np.array([vocabulary.document], np.int32), modality_ids=np.zeros(1, np.int8), items=record
        )
    closed = interleave(vocabulary, spans)
    return EncodedPrompt(token_ids=closed.token_ids[:-1], modality_ids=closed.modality_ids[:-1], items=record)


def _read(item: str | Path) -> RawSpan:
    if isinstance(item, str):
        return RawSpan(modality=Modality.TEXT, text=item)
    suffix = item.suffix.lower().removeprefix(".")
    modality = next((m for m, extensions in EXTENSIONS.items() if suffix in extensions), None)
    if modality is None:
        known = ", ".join(extension for extensions in EXTENSIONS.values() for extension in extensions)
        raise GenerateError(f"prompt: {item}: no known kind of file; use one of {known}")
    if not item.is_file():
        raise GenerateError(f"prompt: {item}: no such file; correct its path")
    data = item.read_bytes()
    if modality is not Modality.TEXT:
        return RawSpan(modality=modality, data=data, uri=str(item))
    try:
        return RawSpan(modality=modality, text=data.decode().strip(), uri=str(item))
    except UnicodeDecodeError as error:
        raise GenerateError(f"prompt: {item}: not UTF-8 at byte {error.start}; save the text as UTF-8") from error


def _encode(span: RawSpan, vocabulary: Vocabulary, tokenizers: Tokenizers) -> list[EncodedSpan]:
    if span.modality is Modality.TEXT:
        if special := _SPECIAL.search(span.text):
            raise GenerateError(
                f"prompt: character {special.start()}: {special.group()} is a special token and cannot be written in a "
                "text; say with `want` what to generate, and give pictures and sounds as files"
            )
        codes = tokenizers.text.encode([span.text])[0]
        return [EncodedSpan(modality=span.modality, codes=codes, uri=span.uri)] if len(codes) else []
    made_with = vocabulary.preprocessing.get(span.modality.label, {})
    if span.modality is Modality.IMAGE and tokenizers.image is not None:
        background = tuple(made_with["background"])
        pixels = fit_to_codes(
            load_picture(span.content, span.uri, background),
            rows=made_with["rows"],
            columns=made_with["columns"],
            downsampling=tokenizers.image.downsampling,
            fit=made_with["fit"],
            background=background,
        )
        return [EncodedSpan(modality=span.modality, codes=tokenizers.image.encode(pixels[None])[0], uri=span.uri)]
    if span.modality is Modality.AUDIO and tokenizers.audio is not None:
        codec = tokenizers.audio
        waveform = load_sound(span.content, span.uri, codec.sample_rate_hz, loudness_db=made_with["loudness_db"])
        pieces = equal_parts(waveform, codec.hop, made_with["max_frames"])
        return [EncodedSpan(modality=span.modality, codes=codes, uri=span.uri) for codes in codec.encode(pieces)]
    raise GenerateError(
        f"prompt: {span.uri}: the checkpoint was trained without {span.modality.label}; leave the file out"
    )


def _describe(item: RawSpan | EncodedSpan) -> str:
    if isinstance(item, RawSpan):
        return item.text or item.uri or f"{len(item.data):,} bytes"
    return item.uri or f"{' x '.join(map(str, item.codes.shape))} codes"
