"""Token sequences back to text, pixels and waveforms; shared by show, report, generate and evaluate.

Enters: a sequence (or its spans) and tokenizers. Leaves: `DecodedSpan`s, and files of them on request.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.interleave import EncodedSpan
from pipelines.sequence import Modality


class _Text(Protocol):
    def decode(self, ids: NDArray[np.int32]) -> str: ...


class _Image(Protocol):
    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]: ...


class _Audio(Protocol):
    @property
    def sample_rate_hz(self) -> int: ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.float32]: ...


class Decoders(Protocol):
    """Whatever holds the three tokenizers, such as `pipelines.tokenize.tokenizers.Tokenizers`."""

    @property
    def text(self) -> _Text: ...

    @property
    def image(self) -> _Image | None: ...

    @property
    def audio(self) -> _Audio | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedSpan:
    """One span as a person takes it in; exactly one of the three is there."""

    modality: Modality
    text: str | None = None
    pixels: NDArray[np.uint8] | None = None
    """uint8 [H, W, 3], RGB."""
    waveform: NDArray[np.float32] | None = None
    """float32 [samples], nominally in [-1, 1]."""
    sample_rate_hz: int = 0
    uri: str = ""

    @property
    def suffix(self) -> str:
        """Of the file that `to_bytes` makes."""
        return (".txt", ".png", ".wav")[self.modality]

    def describe(self) -> str:
        """The text, or the size of the picture or sound, on one line."""
        if self.text is not None:
            return " ".join(self.text.split())
        if self.pixels is not None:
            return f"{self.pixels.shape[1]} x {self.pixels.shape[0]} pixels"
        samples = 0 if self.waveform is None else len(self.waveform)
        return f"{samples / self.sample_rate_hz:.2f} s at {self.sample_rate_hz:,} Hz"

    def to_bytes(self) -> bytes:
        """The span as a UTF-8 text, PNG or 16-bit WAV file."""
        if self.text is not None:
            return (self.text + "\n").encode()
        sink = io.BytesIO()
        if self.pixels is not None:
            from PIL import Image

            Image.fromarray(self.pixels).save(sink, format="PNG")
        elif self.waveform is not None:
            import soundfile

            soundfile.write(sink, np.clip(self.waveform, -1, 1), self.sample_rate_hz, format="WAV", subtype="PCM_16")
        return sink.getvalue()


def decode(spans: list[EncodedSpan], decoders: Decoders) -> list[DecodedSpan]:
    """Reconstruct each span.

    Raises:
        ValueError: a span of a modality without a tokenizer, or a code outside its codebook.
    """
    return [_decode(span, decoders) for span in spans]


def _decode(span: EncodedSpan, decoders: Decoders) -> DecodedSpan:
    if span.modality is Modality.TEXT:
        return DecodedSpan(modality=span.modality, text=decoders.text.decode(span.codes), uri=span.uri)
    if span.modality is Modality.IMAGE:
        if decoders.image is None:
            raise ValueError("an image span, but no image tokenizer is at hand; name one under tokenizers.image")
        return DecodedSpan(modality=span.modality, pixels=decoders.image.decode(span.codes[None])[0], uri=span.uri)
    if decoders.audio is None:
        raise ValueError("an audio span, but no audio tokenizer is at hand; name one under tokenizers.audio")
    return DecodedSpan(
        modality=span.modality,
        waveform=decoders.audio.decode(span.codes),
        sample_rate_hz=decoders.audio.sample_rate_hz,
        uri=span.uri,
    )


def write_spans(spans: list[DecodedSpan], folder: Path, stem: str) -> list[Path]:
    """Write one file a span, `<stem>-<index>-<modality>.<suffix>`, and say which."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}-{index}-{span.modality.label}{span.suffix}" for index, span in enumerate(spans)]
    for path, span in zip(paths, spans, strict=True):
        path.write_bytes(span.to_bytes())
    return paths
