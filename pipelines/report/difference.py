"""`braid stats --diff`: two versions of a dataset, or two datasets, side by side, as plain data.

Enters: two datasets. Leaves: JSON values. Always holds: they come from the roll-ups and logs alone, like those of
`summarize`; distributions of ids are compared only where the ids mean the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.report.histogram import edges, histogram
from pipelines.report.pieces import Names, names
from pipelines.report.summary import code_counts, figures_of
from pipelines.sequence import Vocabulary
from pipelines.shards.dataset import Dataset, DatasetError
from pipelines.shards.statistics import MODALITIES, Statistics, entropy_bits

SCHEMA = "braid.stats-diff/1"

SHIFTED = 24
"""Text pieces that are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two."""

    dataset: Dataset
    statistics: Statistics
    figures: dict[str, Any]
    known: Names

    @classmethod
    def of(cls, dataset: Dataset) -> Side:
        statistics, known = dataset.statistics(), names(dataset)
        return cls(dataset=dataset, statistics=statistics, figures=figures_of(dataset, statistics, known), known=known)


def opened(name: str, within: str | None = None) -> Dataset:
    """A side as a user names it: a dataset, `DATASET@VERSION`, or a version of the dataset `within`.

    Raises:
        DatasetError: nothing there.
    """
    if within is not None:
        if not name.isdecimal():
            raise DatasetError(
                f"{name}: no version; give two versions of {within}, or leave it out and name two datasets"
            )
        return Dataset.open(within, int(name))
    path, at, version = name.rpartition("@")
    return Dataset.open(path, int(version)) if at and version.isdecimal() else Dataset.open(name)


def compare(a: Side, b: Side) -> dict[str, Any]:
    """What differs between two sides, B being the later or other one."""
    first, second = a.dataset.vocabulary, b.dataset.vocabulary
    mine, theirs = a.dataset.names, b.dataset.names
    return {
        "schema": SCHEMA,
        "a": {"dataset": a.dataset.uri, "version": a.dataset.version},
        "b": {"dataset": b.dataset.uri, "version": b.dataset.version},
        "vocabulary": first.differences(second),
        "figures": [{"name": name, "a": x, "b": y} for name, x, y in _figures(a.figures, b.figures)],
        "shards": {"both": len(mine & theirs), "a": len(mine - theirs), "b": len(theirs - mine)},
        "common_documents": a.statistics.common_documents(b.statistics),
        "sources": _sources(a.figures["sources"], b.figures["sources"]),
        "lengths": _lengths(a.statistics, b.statistics),
        "codebooks": _codebooks(a, b),
        "pieces": _pieces(a, b),
        "quarantine": _beside(a.figures["quarantine"], b.figures["quarantine"]),
    }


def _figures(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, int, int]]:
    rows = [("documents", a["documents"], b["documents"])]
    rows.append(("distinct documents, estimated", a["distinct_documents"], b["distinct_documents"]))
    rows += [(f"{m} tokens", a["tokens"][m], b["tokens"][m]) for m in (*MODALITIES, "total")]
    rows += [(f"{m} spans", a["spans"][m]["count"], b["spans"][m]["count"]) for m in MODALITIES]
    rows.append(("raw bytes", a["raw_bytes"]["total"], b["raw_bytes"]["total"]))
    rows.append(("stored bytes", a["bytes"], b["bytes"]))
    rows.append(("shards", a["shards"], b["shards"]))
    rows.append(("median tokens of a document", a["document_tokens"]["0.5"], b["document_tokens"]["0.5"]))
    rows.append(("in quarantine", sum(a["quarantine"].values()), sum(b["quarantine"].values())))
    return rows


def _sources(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    def told(source: Mapping[str, Any] | None) -> dict[str, int]:
        tokens = sum(source["tokens"].values()) if source else 0
        return {"documents": source["documents"] if source else 0, "tokens": tokens}

    return {name: {"a": told(a.get(name)), "b": told(b.get(name))} for name in sorted(a.keys() | b.keys())}


def _lengths(a: Statistics, b: Statistics) -> dict[str, Any]:
    pairs = {"document_tokens": (a.lengths, b.lengths)}
    pairs |= {f"{m}_span": (a.span_lengths[m], b.span_lengths[m]) for m in MODALITIES}
    told = {}
    for name, (first, second) in pairs.items():
        if first and second:
            within = edges(min(*first, *second), max(*first, *second))
            told[name] = {
                "a": histogram(first, within),
                "b": histogram(second, within),
                "distance": round(_distance(first, second), 4),
            }
    return told


def _distance(a: Counter[int], b: Counter[int]) -> float:
    """Kolmogorov-Smirnov: the largest gap between the two distribution functions, 0 to 1."""
    values = sorted({*a, *b})
    first, second = (np.cumsum([counts[v] for v in values]) / counts.total() for counts in (a, b))
    return float(np.abs(first - second).max())


def _codebooks(a: Side, b: Side) -> dict[str, Any]:
    mine, theirs = (code_counts(s.statistics, s.dataset.vocabulary.text_pieces) for s in (a, b))
    same = {name for name in mine.keys() & theirs.keys() if _same_ids(name, a.dataset.vocabulary, b.dataset.vocabulary)}
    books_a, books_b = a.figures["codebooks"], b.figures["codebooks"]
    return {
        name: {
            "a": books_a.get(name),
            "b": books_b.get(name),
            "divergence_bits": round(divergence_bits(mine[name], theirs[name]), 4)
            if name in same and mine[name].any() and theirs[name].any()
            else None,
        }
        for name in [*mine, *(n for n in theirs if n not in mine)]
    }


def _same_ids(name: str, a: Vocabulary, b: Vocabulary) -> bool:
    """Whether ids of a codebook mean the same in both."""
    kind = name.partition(" ")[0]
    return getattr(a, f"{kind}_sha256") == getattr(b, f"{kind}_sha256")


def divergence_bits(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Jensen-Shannon divergence of two distributions of ids: 0 where they are alike, 1 where they share nothing (Lin, 1991).

    Args:
        a, b: how often each id occurs, [ids]; at least one of each.
    """
    # Scaled counts, so that both sides weigh the same in the mixture.
    p, q = a / a.sum(), b / b.sum()
    mixture = (p + q) / 2
    inside = mixture > 0
    entropy = float(-(mixture[inside] * np.log2(mixture[inside])).sum())
    return max(0.0, entropy - (entropy_bits(a) + entropy_bits(b)) / 2)


def _pieces(a: Side, b: Side) -> list[dict[str, Any]]:
    """The text pieces whose share changed most, in points of the whole text."""
    if not _same_ids("text", a.dataset.vocabulary, b.dataset.vocabulary):
        return []
    pieces = a.dataset.vocabulary.text_pieces
    first, second = (s.statistics.text_counts[:pieces] for s in (a, b))
    if not (first.any() and second.any()):
        return []
    p, q = first / first.sum(), second / second.sum()
    tokenizer = b.known.tokenizer or a.known.tokenizer
    return [
        {
            "id": int(i),
            "piece": tokenizer.processor.id_to_piece(int(i)) if tokenizer else None,
            "a": round(float(p[i]), 6),
            "b": round(float(q[i]), 6),
        }
        for i in np.argsort(-np.abs(q - p), kind="stable")[:SHIFTED]
        if p[i] != q[i]
    ]


def _beside(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, dict[str, int]]:
    return {key: {"a": a.get(key, 0), "b": b.get(key, 0)} for key in sorted(a.keys() | b.keys())}
