"""What a checkpoint makes of held-out captions, pictures and voices, beside what was there.

Enters: pairs. Leaves: figures by direction, and the samples themselves. Always holds: each figure stands beside the same
figure with another document's reference (shuffled pairing), and beside what the tokenizer alone loses (reconstruction), where
the original can still be read.

- caption to picture: distance in pixels of a thumbnail and in codes; how often the own reference is the nearest of all.
- caption to voice: mel distance along the best alignment; how often the own reference is the nearest of all.
- picture or voice to caption: exact matches, and edit distance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decode import DecodedSpan, decode
from pipelines.evaluate.bootstrap import interval
from pipelines.evaluate.distances import (
    code_distance,
    edit_distance,
    mel_distance,
    mel_spectrum,
    pixel_distance,
    thumbnail,
)
from pipelines.evaluate.pairs import Direction, Pair, Pairs, shuffled
from pipelines.generate import Generator, Request, Sampling
from pipelines.generate.decoding import Watcher
from pipelines.interleave import EncodedSpan, extract
from pipelines.originals import Original, beside, find_originals
from pipelines.rows import rows_at
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset, DatasetError

GENERATED: tuple[Direction, ...] = (
    (Modality.TEXT, Modality.IMAGE),
    (Modality.TEXT, Modality.AUDIO),
    (Modality.IMAGE, Modality.TEXT),
    (Modality.AUDIO, Modality.TEXT),
)

ORIGINALS_S = 15.0
"""How long originals are looked for."""

_SPARE_PIECES = 2
"""A caption may become so many times as long as the longest reference."""

Distances = NDArray[np.float64]
"""[N, N]: of what was generated for pair i to the reference of pair j."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One generated span with all that it is to be compared with."""

    direction: Direction
    number: int
    """Of its row."""
    given: DecodedSpan
    reconstruction: DecodedSpan
    """The reference, decoded from its tokens."""
    original: DecodedSpan | None
    """What it was tokenized from; None where that is gone."""
    generated: DecodedSpan
    told: dict[str, float]
    """Its own distances, by name."""


def measure_generation(
    pairs: Pairs,
    generator: Generator,
    dataset: Dataset,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    watcher: Watcher | None = None,
) -> tuple[list[dict[str, Any]], list[Shown]]:
    """Generate for the first pairs of each direction.

    Args:
        samples: pairs of each direction.
        sampling: of pictures and sounds; captions are the likeliest ones.

    Returns:
        The figures of each direction that has two pairs or more, as JSON values; and what was generated.
    """
    context = generator.model.config.max_sequence_length
    figures: list[dict[str, Any]] = []
    shown: list[Shown] = []
    for direction in GENERATED:
        chosen = pairs.of(direction)[:samples]
        partners = shuffled(chosen, context)
        if len(chosen) < 2:
            continue
        # The tokens that say how long a voice is are text, too.
        text = Sampling(temperature=0) if direction[1] is Modality.TEXT else replace(sampling, guidance=1.0)
        by_modality = {"text": text, "image": sampling, "audio": sampling}
        request = Request(sampling=by_modality, seed=seed, batch_size=samples)
        made = _generate(generator, chosen, direction[1], request, watcher)
        references = [decode([pair.predicted], generator.tokenizers)[0] for pair in chosen]
        originals, lacking = _originals(dataset, generator, chosen)
        compare = {Modality.IMAGE: _pictures, Modality.AUDIO: _sounds, Modality.TEXT: _texts}[direction[1]]
        told, own = compare(chosen, made, references, originals, partners, seed)
        figures.append(
            {
                "given": direction[0].label,
                "predicted": direction[1].label,
                "samples": len(chosen),
                "originals_missing": lacking,
                **told,
            }
        )
        for i, pair in enumerate(chosen):
            given = decode([pair.given], generator.tokenizers)[0]
            shown.append(
                Shown(direction=direction, number=pair.document.number, given=given, reconstruction=references[i],
                      original=originals[i], generated=made[i][1], told={name: row[i] for name, row in own.items()})
            )  # fmt: skip
    return figures, shown


_Made = tuple[EncodedSpan, DecodedSpan]


def _generate(
    generator: Generator, pairs: Sequence[Pair], wanted: Modality, request: Request, watcher: Watcher | None
) -> list[_Made]:
    """One continuation of each given span. Pictures get the shape of their reference; voices may take their time."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        groups[pair.predicted.codes.shape if wanted is Modality.IMAGE else ()].append(i)
    longest = max(pair.predicted.codes.size for pair in pairs)
    made: dict[int, _Made] = {}
    for shape, members in groups.items():
        rows, columns = shape if shape else (None, None)
        asked = replace(request, want=wanted.label, rows=rows, columns=columns, max_tokens=_SPARE_PIECES * longest)
        for i, sample in zip(
            members, generator.generate([[pairs[i].given] for i in members], asked, watcher), strict=True
        ):
            sequence = sample.sequence
            codes = extract(generator.vocabulary, sequence.token_ids, sequence.spans[-1])
            made[i] = codes, sample.spans[-1]
    return [made[i] for i in range(len(pairs))]


def _originals(
    dataset: Dataset, generator: Generator, pairs: Sequence[Pair]
) -> tuple[list[DecodedSpan | None], str | None]:
    """What the predicted spans were tokenized from, and why some of it is missing."""
    stored = {pair.document.number: None for pair in pairs}
    rows = list(rows_at(dataset, stored))
    try:
        found = find_originals(dataset, rows, generator.tokenizers, timeout_s=ORIGINALS_S)
    except (DatasetError, KeyError) as error:
        found = [Original(missing=f"the dataset does not tell its inputs: {error}")] * len(rows)
    by_number = dict(zip(sorted(stored), found, strict=True))
    spans: list[DecodedSpan | None] = []
    for pair in pairs:
        # Only the order of the modalities says which span is which.
        decoded = [DecodedSpan(modality=span.modality) for span in pair.document.sequence.spans]
        spans.append(beside(decoded, by_number[pair.document.number].spans)[pair.at])
    return spans, next((original.missing for original in found if original.missing), None)


def _pictures(
    pairs: Sequence[Pair],
    made: Sequence[_Made],
    references: Sequence[DecodedSpan],
    originals: Sequence[DecodedSpan | None],
    partners: Sequence[int | None],
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    wanted = [_small(span) for span in references]
    pixels = _matrix([_small(span) for _, span in made], wanted, pixel_distance)
    codes = _matrix([span.codes for span, _ in made], [pair.predicted.codes for pair in pairs], code_distance)
    lost = _lost(originals, wanted, _small, pixel_distance)
    told = {
        "pixel_distance": _distance(pixels, partners, lost, seed),
        # Codes are what the tokenizer made of the original: there is nothing that it could lose on the way back.
        "code_distance": _distance(codes, partners, [0.0] * len(pairs), seed),
        "nearest": {"pixels": _nearest(pixels, partners, seed), "codes": _nearest(codes, partners, seed)},
    }
    return told, {"pixel distance": _own(pixels), "codes that differ": _own(codes)}


def _sounds(
    pairs: Sequence[Pair],
    made: Sequence[_Made],
    references: Sequence[DecodedSpan],
    originals: Sequence[DecodedSpan | None],
    partners: Sequence[int | None],
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    heard, wanted = [_mel(span) for _, span in made], [_mel(span) for span in references]
    mels = _matrix(heard, wanted, mel_distance)
    lost = _lost(originals, wanted, _mel, mel_distance)
    told = {
        "mel_distance_db": _distance(mels, partners, lost, seed),
        "nearest": {"mel": _nearest(mels, partners, seed)},
    }
    return told, {"mel distance (dB)": _own(mels)}


def _texts(
    pairs: Sequence[Pair],
    made: Sequence[_Made],
    references: Sequence[DecodedSpan],
    originals: Sequence[DecodedSpan | None],
    partners: Sequence[int | None],
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    edits = _matrix([_words(span) for _, span in made], [_words(span) for span in references], edit_distance)
    # The text tokenizer gives back what it was given: it loses nothing.
    nothing = [0.0] * len(pairs)
    told = {
        "edit_distance": _distance(edits, partners, nothing, seed),
        "exact": _distance((edits == 0).astype(np.float64), partners, [1.0] * len(pairs), seed),
        "nearest": {"edits": _nearest(edits, partners, seed)},
    }
    return told, {"edit distance": _own(edits)}


def _matrix(made: Sequence[Any], references: Sequence[Any], distance: Callable[[Any, Any], float]) -> Distances:
    return np.array([[distance(one, other) for other in references] for one in made])


def _lost(
    originals: Sequence[DecodedSpan | None],
    references: Sequence[Any],
    form: Callable[[DecodedSpan], Any],
    distance: Callable[[Any, Any], float],
) -> list[float | None]:
    """How far each reference, which came out of the tokenizer, is from what went in; None where that is not there."""
    return [
        None if original is None else distance(form(original), reference)
        for original, reference in zip(originals, references, strict=True)
    ]


def _own(distances: Distances) -> list[float]:
    return [float(value) for value in np.diagonal(distances)]


def _distance(
    distances: Distances, partners: Sequence[int | None], lost: Sequence[float | None], seed: int
) -> dict[str, Any]:
    """Mean to the own reference, to the partner's, and what reconstruction alone comes to."""
    own = np.diagonal(distances)
    paired = [(i, j) for i, j in enumerate(partners) if j is not None]
    other = np.array([distances[i, j] for i, j in paired])
    known = [value for value in lost if value is not None]
    same = own[[i for i, _ in paired]]
    return {
        "own": float(own.mean()),
        "interval": interval(own, seed=seed),
        "shuffled": float(other.mean()) if paired else None,
        "better_by": float((other - same).mean()) if paired else None,
        "better_by_interval": interval(other - same, seed=seed) if paired else None,
        "reconstruction": float(np.mean(known)) if known else None,
    }


def _nearest(distances: Distances, partners: Sequence[int | None], seed: int) -> dict[str, Any]:
    """How often the own reference is the nearest of all; where several are equally near, each has its share."""
    hits = distances == distances.min(axis=1, keepdims=True)
    shares = hits / hits.sum(axis=1, keepdims=True)
    own = np.diagonal(shares)
    other = [float(shares[i, j]) for i, j in enumerate(partners) if j is not None]
    return {
        "own": float(own.mean()),
        "interval": interval(own, seed=seed),
        "shuffled": float(np.mean(other)) if other else None,
        "chance": 1 / len(distances),
    }


def _small(span: DecodedSpan) -> NDArray[np.float64]:
    assert span.pixels is not None
    return thumbnail(span.pixels)


def _mel(span: DecodedSpan) -> NDArray[np.float64]:
    assert span.waveform is not None
    return mel_spectrum(span.waveform, span.sample_rate_hz)


def _words(span: DecodedSpan) -> str:
    return " ".join((span.text or "").split())
