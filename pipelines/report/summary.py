"""What `braid stats` says of a dataset version, as plain data: `docs/stats.schema.json` describes it.

Enters: a dataset. Leaves: JSON values. Always holds: they come from roll-ups, logs and the recipe; no shard is opened.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.report.growth import growth
from pipelines.report.histogram import histogram
from pipelines.report.padding import expected_padding, lengths_to_ask
from pipelines.report.pieces import Names, names, piece_figures
from pipelines.report.remarks import remarks
from pipelines.shards.dataset import Dataset, DatasetError, Shard
from pipelines.shards.statistics import MODALITIES, SourceCounts, Statistics, entropy_bits, quantile
from pipelines.tokenize.history import newest_recipe

SCHEMA = "braid.stats/1"
"""Raised with every change that a reader of the JSON would notice; new keys may come without it."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

LARGEST = 5
"""Shards that are named."""


def summarize(dataset: Dataset) -> dict[str, Any]:
    """The figures of a dataset version.

    Quantiles are by nearest rank. Lengths are exact below 4,096 and within 0.025% above; `distinct_documents` is an estimate
    (HyperLogLog, 1.6% standard error).
    """
    return figures_of(dataset, dataset.statistics(), names(dataset))


def figures_of(dataset: Dataset, statistics: Statistics, known: Names) -> dict[str, Any]:
    """`summarize`, of statistics that are at hand."""
    shards = dataset.shards()
    tokens = {modality: statistics.tokens(modality) for modality in MODALITIES}
    sequence_length = _sequence_length(dataset)
    lengths = statistics.lengths
    figures: dict[str, Any] = {
        "schema": SCHEMA,
        "dataset": dataset.uri,
        "version": dataset.version,
        "fingerprint": dataset.vocabulary.fingerprint,
        "sequence_length": sequence_length,
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "documents": statistics.documents,
        "distinct_documents": statistics.distinct_documents,
        "duplicates": dataset.duplicates,
        "validation_share": dataset.validation_share,
        "tokens": tokens | {"total": sum(tokens.values())},
        "raw_bytes": _raw_bytes(statistics.sources.values()),
        "document_tokens": _quantiles(lengths),
        "spans_per_document": _quantiles(statistics.spans_per_document),
        "spans": {
            modality: {"count": sum(counts.values()), "length": _quantiles(counts)}
            for modality, counts in statistics.span_lengths.items()
        },
        "histograms": {
            "document_tokens": histogram(lengths),
            "spans_per_document": histogram(statistics.spans_per_document),
            **{f"{modality}_span": histogram(counts) for modality, counts in statistics.span_lengths.items()},
            "shard_bytes": histogram(Counter(shard.size for shard in shards)),
        },
        "sources": {name: _source(source) for name, source in sorted(statistics.sources.items())},
        "codebooks": codebooks(statistics, dataset),
        "text_pieces": piece_figures(statistics.text_counts[: dataset.vocabulary.text_pieces], known),
        "quarantine": _quarantine(dataset, statistics),
        "shard_sizes": _shard_sizes(shards),
        "padding": [asdict(expected_padding(lengths, n)) for n in lengths_to_ask(sequence_length)] if lengths else [],
        "growth": [asdict(entry) for entry in growth(dataset)],
        "tokenizers": _tokenizers(dataset),
    }
    return figures | {"remarks": remarks(figures)}


def _sequence_length(dataset: Dataset) -> int | None:
    try:
        return newest_recipe(dataset.storage).sequence_length
    except DatasetError:
        return None


def _quantiles(counts: Counter[int]) -> dict[str, int]:
    return {f"{q:g}": quantile(counts, q) for q in QUANTILES}


def _raw_bytes(sources: Iterable[SourceCounts]) -> dict[str, int]:
    """Of the documents of which they are known."""
    sums = dict.fromkeys(MODALITIES, 0)
    documents = 0
    for source in sources:
        documents += source.weighed
        for modality in MODALITIES:
            sums[modality] += source.raw_bytes[modality]
    return sums | {"total": sum(sums.values()), "documents": documents}


def _source(source: SourceCounts) -> dict[str, Any]:
    return {
        "documents": source.documents,
        "tokens": dict(source.tokens),
        "raw_bytes": _raw_bytes([source]),
        "dropped": dict(source.dropped),
        "rejected": dict(source.rejected),
    }


def codebooks(statistics: Statistics, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Use of the text pieces and of each codebook."""
    return {
        name: {
            "size": len(counts),
            "used": int(np.count_nonzero(counts)),
            "entropy_bits": round(entropy_bits(counts), 3),
            "perplexity": round(2 ** entropy_bits(counts), 1),
        }
        for name, counts in code_counts(statistics, dataset.vocabulary.text_pieces).items()
    }


def code_counts(statistics: Statistics, text_pieces: int) -> dict[str, NDArray[np.int64]]:
    """How often each code was used, [codes], by the codebook's name."""
    found: dict[str, NDArray[np.int64]] = {"text pieces": statistics.text_counts[:text_pieces]}
    if len(statistics.image_counts):
        found["image"] = statistics.image_counts
    return found | {f"audio {index}": counts for index, counts in enumerate(statistics.audio_counts)}


def _quarantine(dataset: Dataset, statistics: Statistics) -> dict[str, int]:
    """Rejects by reason, from the roll-up; what shards of an older Braid do not say is read from their rejects."""
    reasons: Counter[str] = Counter()
    for source in statistics.sources.values():
        reasons.update(source.rejected)
    if reasons.total() != dataset.rejects():
        reasons = Counter(row["reason"] for row in dataset.quarantined())
    return dict(reasons.most_common())


def _shard_sizes(shards: list[Shard]) -> dict[str, Any]:
    sizes = np.array([shard.size for shard in shards], np.int64)
    largest = sorted(shards, key=lambda shard: (-shard.size, shard.name))[:LARGEST]
    mean = float(sizes.mean()) if len(sizes) else 0.0
    return {
        "bytes": _quantiles(Counter(sizes.tolist())),
        "rows": _quantiles(Counter(shard.rows for shard in shards)),
        "mean_bytes": round(mean),
        # A job that reads whole shards waits for the largest.
        "largest_by_mean": round(int(sizes.max()) / mean, 2) if mean else 0.0,
        "largest": [{"name": shard.name, "bytes": shard.size, "rows": shard.rows} for shard in largest],
    }


def _tokenizers(dataset: Dataset) -> Mapping[str, Any]:
    """What made the ids: everything the fingerprint is about."""
    return json.loads(json.dumps(dataset.vocabulary.to_dict()))  # type: ignore[no-any-return]
