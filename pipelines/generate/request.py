"""What is to be generated, as a person asks for it, and what that means for one vocabulary.

Enters: a `Request`. Leaves: `Wish`es, one for each span to be made. Always holds: what a checkpoint cannot make is refused
here, before anything is computed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from pipelines.generate.errors import GenerateError
from pipelines.generate.sampling import Sampling
from pipelines.interleave import MEDIA_OPENING
from pipelines.sequence import MAX_FRAMES, MAX_NUMBER, Modality, Vocabulary

_LABELS = [modality.label for modality in Modality]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Everything but prompt and model that decides what is generated."""

    want: str | Sequence[str] = "text"
    """The spans to generate, in order: text, image, audio."""
    sampling: Sampling | Mapping[str, Sampling] = field(default_factory=Sampling)
    """For all modalities, or by name; what a mapping leaves out is sampled by the defaults."""
    samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    max_tokens: int = 256
    """The most pieces of a text span."""
    rows: int | None = None
    """Rows of image codes; by default what all pictures of the dataset have, else the model's choice."""
    columns: int | None = None
    seconds: float | None = None
    """Length of an audio span; by default the model's choice, up to the longest span of the dataset."""
    batch_size: int = 16
    """Rows computed at once. Another size may round differently and so, rarely, choose another token."""

    def __post_init__(self) -> None:
        modalities = self.modalities
        if not modalities:
            raise GenerateError("want is empty: name at least one of " + ", ".join(_LABELS))
        for first, second in pairwise(modalities):
            if first is second is Modality.TEXT:
                raise GenerateError(
                    "want: text follows text, and nothing would part them; ask once, with more max_tokens"
                )
        for name in ("samples", "max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerateError(f"{name} is {getattr(self, name)}: give at least 1")
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_NUMBER:
                raise GenerateError(f"{name} is {value}: an image has 1 to {MAX_NUMBER} {name} of codes")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise GenerateError(f"seconds is {self.seconds}: give a finite length above 0")
        if isinstance(self.sampling, Mapping):
            for name in self.sampling:
                _modality(name, "sampling")

    @property
    def modalities(self) -> list[Modality]:
        """`want`, understood."""
        return [_modality(name, "want") for name in ([self.want] if isinstance(self.want, str) else self.want)]

    def sampling_of(self, modality: Modality) -> Sampling:
        """How tokens of a modality are chosen; special tokens are text."""
        if isinstance(self.sampling, Sampling):
            return self.sampling
        return self.sampling.get(modality.label, Sampling())

    @property
    def guided(self) -> bool:
        """Whether any modality is sampled with guidance."""
        return any(self.sampling_of(modality).guidance != 1 for modality in Modality)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values, the sampling by modality."""
        return {
            "want": [modality.label for modality in self.modalities],
            "sampling": {modality.label: asdict(self.sampling_of(modality)) for modality in Modality},
            **{
                name: getattr(self, name)
                for name in ("samples", "seed", "max_tokens", "rows", "columns", "seconds", "batch_size")
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """One span to generate."""

    modality: Modality
    rows: int | None = None
    """Image: rows of codes. Audio: frames. None: the model chooses."""
    columns: int | None = None
    """Image: columns of codes; None: the model chooses. Audio: codebooks."""
    limit: int = 0
    """Text: the most pieces. Audio: the most frames that the model may choose."""

    @property
    def least_tokens(self) -> int:
        """What the span takes at the least, with the tokens that open it."""
        if self.modality is Modality.TEXT:
            return 1
        return MEDIA_OPENING + (self.rows or 1) * (self.columns or 1)

    @property
    def most_tokens(self) -> int:
        """What the span takes at the most, if the context has room for it."""
        if self.modality is Modality.TEXT:
            return self.limit
        return MEDIA_OPENING + (self.rows or self.limit or MAX_NUMBER) * (self.columns or MAX_NUMBER)


def wishes(request: Request, vocabulary: Vocabulary, *, frame_rate_hz: float, whose: str) -> list[Wish]:
    """What a request means for a vocabulary.

    Args:
        frame_rate_hz: frames a second of the audio tokenizer; unread without one.
        whose: names the checkpoint in errors.

    Raises:
        GenerateError: a modality that the vocabulary lacks, or a length that no span can state.
    """
    return [_wish(request, modality, vocabulary, frame_rate_hz, whose) for modality in request.modalities]


def _wish(request: Request, modality: Modality, vocabulary: Vocabulary, frame_rate_hz: float, whose: str) -> Wish:
    if not vocabulary.size(modality):
        able = ", ".join(m.label for m in Modality if vocabulary.size(m))
        raise GenerateError(f"want: {whose} was trained without {modality.label}; it makes {able}")
    made_with = vocabulary.preprocessing.get(modality.label, {})
    if modality is Modality.TEXT:
        return Wish(modality=modality, limit=request.max_tokens)
    if modality is Modality.IMAGE:
        # With buckets, rows and columns are a budget, and pictures have various shapes.
        shape = {} if made_with.get("fit") == "buckets" else made_with
        return Wish(
            modality=modality,
            rows=request.rows or shape.get("rows"),
            columns=request.columns or shape.get("columns"),
        )
    frames = None if request.seconds is None else max(1, round(request.seconds * frame_rate_hz))
    if frames is not None and frames > MAX_FRAMES:
        raise GenerateError(
            f"seconds is {request.seconds:g}: {frames:,} frames at {frame_rate_hz:g} Hz, and a span has at most "
            f"{MAX_FRAMES:,}; ask for at most {MAX_FRAMES / frame_rate_hz:g} s"
        )
    limit = made_with.get("max_frames", MAX_FRAMES)
    return Wish(modality=modality, rows=frames, columns=vocabulary.audio_codebooks, limit=limit)


def _modality(name: str, place: str) -> Modality:
    if name in _LABELS:
        return Modality(_LABELS.index(name))
    near = difflib.get_close_matches(str(name).lower(), [*_LABELS, "picture", "speech", "sound"], n=1, cutoff=0.7)
    meant = {"picture": "image", "speech": "audio", "sound": "audio"}.get(near[0], near[0]) if near else None
    hint = f"did you mean {meant}?" if meant else f"choose from {', '.join(_LABELS)}"
    raise GenerateError(f"{place}: {name!r} is no modality; {hint}")
