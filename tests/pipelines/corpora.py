"""Small datasets and documents that tests make for themselves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.corpus.documents import Reject
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.writer import ShardWriter, WrittenShard

VOCABULARY = Vocabulary(
    text_pieces=50,
    text_sha256="t",
    image_codebook_size=32,
    image_sha256="i",
    audio_codebook_size=16,
    audio_codebooks=2,
    audio_sha256="a",
)


def random_row(identity: str, rng: np.random.Generator, *, source: str = "stamps") -> Row:
    """A document of text, picture and sound, in a random order of its media."""
    media = [
        EncodedSpan(modality=Modality.IMAGE, codes=rng.integers(0, 32, (4, 5), dtype=np.int32), uri="p.png"),
        EncodedSpan(modality=Modality.AUDIO, codes=rng.integers(0, 16, (rng.integers(1, 9), 2), dtype=np.int32)),
    ]
    rng.shuffle(media)  # type: ignore[arg-type]
    text = EncodedSpan(modality=Modality.TEXT, codes=rng.integers(0, 50, rng.integers(1, 30), dtype=np.int32))
    return Row(
        row_id=identity,
        content_hash=rng.bytes(16).hex(),
        source=f"{source}/{identity}",
        sequence=interleave(VOCABULARY, [text, *media]),
    )


def write_unit(dataset: Dataset, unit: str, rows: Iterable[Row], rejects: Iterable[Reject] = ()) -> WrittenShard:
    """Write a shard that is not committed."""
    writer = ShardWriter(dataset.storage, dataset.vocabulary, unit, {"rows": []})
    for row in rows:
        writer.add(row)
    for reject in rejects:
        writer.reject(reject)
    return writer.finish()


def make_dataset(folder: Path, *, units: int = 3, rows: int = 7, seed: int = 0) -> Dataset:
    """A dataset of random documents, one commit a unit."""
    rng = np.random.default_rng(seed)
    dataset = Dataset.create(folder, VOCABULARY, validation_share=0.2)
    for unit in range(units):
        dataset.commit([write_unit(dataset, f"u{unit}", [random_row(f"{unit}x{i}", rng) for i in range(rows)])])
    return dataset
