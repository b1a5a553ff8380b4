"""A token dataset of any size for benchmarks of loading: real documents, repeated with variation.

Enters: Debian's packages of texts, pictures and speech, tokenized once by `braid tokenize`. Leaves: a dataset of at least so
many tokens. Always holds: every document is a new cut of real ones (texts begin and end elsewhere, codes of pictures and
sounds are turned), so that frequencies, runs and lengths, and with them compression, are those of real data.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.corpora import TEXT_PACKAGES, texts
from pipelines.corpus.debian import default_cache
from pipelines.interleave import EncodedSpan, deinterleave, interleave
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.shards.writer import ShardWriter

SHARD_TOKENS = 20_000_000
_MOST_TEXT = 3000
"""Pieces of the longest text; the shortest have 30, and lengths are log-uniform between."""


def real_tokens(folder: Path) -> Dataset:
    """The demo's stamps and handbook, and the texts of `benchmarks.corpora`, tokenized; made once."""
    where = folder / "real_tokens"
    if Dataset.exists(where):
        return Dataset.open(where)
    from pipelines.corpus.demo import prepare
    from pipelines.tokenize.job import tokenize
    from pipelines.tokenize.recipe import TokenizeRecipe

    prepare(folder / "demo_corpus", default_cache())
    scripts = texts(folder / "texts")
    stamps = {
        "name": "stamps",
        "reader": "media_folder",
        "path": str(folder / "demo_corpus/stamps"),
        "templates": ["{text}{image}{audio}", "{audio}{image}{text}"],
    }
    lines = [{"name": name, "reader": "jsonl", "path": str(scripts[name]), "id_field": "id"} for name in TEXT_PACKAGES]
    tokenize(
        TokenizeRecipe.model_validate(
            {
                "dataset": str(where),
                "sources": [stamps, *lines],
                "tokenizers": {
                    "text": {"model": "mistral-v1"},
                    "image": {"checkpoint": "drawings", "rows": 16, "columns": 16, "fit": "pad"},
                    "audio": {"checkpoint": "speech", "n_q": 4, "max_frames": 250},
                },
                "sequence_length": 4096,
            }
        )
    )
    return Dataset.open(where)


class _Variation:
    """Endless documents made of real ones."""

    def __init__(self, real: Dataset, seed: int) -> None:
        self.vocabulary = real.vocabulary
        self._rng = np.random.default_rng(seed)
        texts: list[np.ndarray] = []
        self._media: list[list[EncodedSpan]] = []
        for batch in real.read(["token_ids", "modality_ids"]):
            for row in batch.to_pylist():
                spans = deinterleave(
                    real.vocabulary, np.array(row["token_ids"], np.int32), np.array(row["modality_ids"], np.int8)
                )
                texts += [span.codes for span in spans if span.modality is Modality.TEXT]
                if len(spans) > 1:
                    self._media.append(spans)
        self._text = np.concatenate(texts)

    def document(self, media_share: float) -> list[EncodedSpan]:
        rng = self._rng
        if rng.random() >= media_share:
            length = int(np.exp(rng.uniform(np.log(30), np.log(_MOST_TEXT))))
            at = int(rng.integers(len(self._text) - length))
            return [EncodedSpan(modality=Modality.TEXT, codes=self._text[at : at + length])]
        spans = self._media[int(rng.integers(len(self._media)))]
        return [
            span
            if span.modality is Modality.TEXT
            else replace(span, codes=np.roll(span.codes, int(rng.integers(len(span.codes))), axis=0))
            for span in spans
        ]


def token_corpus(
    folder: Path, tokens: int, *, name: str = "tokens", seed: int = 0, media_share: float = 0.5
) -> Dataset:
    """A dataset of at least so many tokens below a folder; made once for each size."""
    where = folder / f"{name}-{tokens}"
    if Dataset.exists(where) and (dataset := Dataset.open(where)).version:
        return dataset
    variation = _Variation(real_tokens(folder), seed)
    dataset = Dataset.create(where, variation.vocabulary, validation_share=0.0)
    written, made, number = [], 0, 0
    while made < tokens:
        unit = f"{name}{len(written):05}"
        with ShardWriter(dataset.storage, dataset.vocabulary, unit, {"rows": []}) as writer:
            target = min(made + SHARD_TOKENS, tokens)
            while made < target:
                sequence = interleave(dataset.vocabulary, variation.document(media_share))
                identity = f"{seed:016x}{number:016x}"
                row = Row(row_id=identity, content_hash=identity, source=f"{name}/{number}", sequence=sequence)
                writer.add(row)
                made, number = made + len(sequence.token_ids), number + 1
            written.append(writer.finish())
        print(f"{where}: {made:,} of {tokens:,} tokens", flush=True)
    dataset.commit(written)
    return Dataset.open(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmarks"))
    parser.add_argument("--tokens", type=int, default=20_000_000)
    arguments = parser.parse_args()
    dataset = token_corpus(arguments.folder, arguments.tokens)
    print(f"{dataset.uri}: {dataset.statistics().tokens():,} tokens in {len(dataset.shards())} shards")


if __name__ == "__main__":
    main()
