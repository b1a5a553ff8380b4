"""A token dataset without tokenizers or a corpus: random documents with the shape of the fixed workload.

Enters: how many tokens, and how long the longest document is. Leaves: a dataset of the reference vocabularies. Always holds:
lengths and shares of the modalities are those of `packed_workload`, so that a step of a run on it has the work of that
benchmark's steps; documents keep the contract of a sequence; no document is held out. Frequencies of ids are Zipf's. For real
text and media there is `token_corpus`, which needs tokenizers and Debian's packages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.packed_workload import SHARES, document_lengths
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import MAX_NUMBER, Modality, Vocabulary
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.writer import ShardWriter

VOCABULARY = Vocabulary(
    text_pieces=50257 - 4 - MAX_NUMBER,
    text_sha256="random",
    image_codebook_size=16384,
    image_sha256="random",
    audio_codebook_size=256,
    audio_codebooks=4,
    audio_sha256="random",
)
"""Sizes of the reference configuration: 50,257, 16,384 and 1,024 ids."""

SHARD_TOKENS = 2_000_000
_SPECIAL = 8
"""Two around a document, three before each media span."""


def shaped_dataset(where: Path, tokens: int, *, longest: int = 4096, seed: int = 0) -> Dataset:
    """A dataset of about so many tokens."""
    rng = np.random.default_rng(seed)
    dataset = Dataset.create(where, VOCABULARY, validation_share=0.0)
    lengths = document_lengths(rng, tokens, longest // 16, longest)
    written, number = [], 0
    while number < len(lengths):
        with ShardWriter(dataset.storage, VOCABULARY, f"unit{len(written):05}", {"rows": []}) as writer:
            made = 0
            while made < SHARD_TOKENS and number < len(lengths):
                sequence = interleave(VOCABULARY, _document(lengths[number], rng))
                identity = f"{seed:016x}{number:016x}"
                writer.add(Row(row_id=identity, content_hash=identity, source=f"random/{number}", sequence=sequence))
                made, number = made + len(sequence.token_ids), number + 1
            written.append(writer.finish())
    dataset.commit(written)
    return Dataset.open(where)


def _document(length: int, rng: np.random.Generator) -> list[EncodedSpan]:
    """Text, a picture about as wide as high, a sound; together so many tokens, the special ones included."""
    side = max(1, min(MAX_NUMBER, int((length * SHARES["image"]) ** 0.5)))
    frames = max(1, int(length * SHARES["audio"]) // VOCABULARY.audio_codebooks)
    shapes = {
        Modality.IMAGE: (side, max(1, min(MAX_NUMBER, int(length * SHARES["image"]) // side))),
        Modality.AUDIO: (frames, VOCABULARY.audio_codebooks),
    }
    media = sum(rows * columns for rows, columns in shapes.values())
    sizes = {Modality.IMAGE: VOCABULARY.image_codebook_size, Modality.AUDIO: VOCABULARY.audio_codebook_size}
    text = _ids(rng, VOCABULARY.text_pieces, (max(1, length - media - _SPECIAL),))
    return [
        EncodedSpan(modality=Modality.TEXT, codes=text),
        *(EncodedSpan(modality=m, codes=_ids(rng, sizes[m], shape)) for m, shape in shapes.items()),
    ]


def _ids(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.minimum(rng.zipf(1.3, size=shape) - 1, size - 1).astype(np.int32)
