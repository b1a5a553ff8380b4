"""Mergeable statistics of shards: counted once by the worker that writes a shard, added up for ever after.

Enters: rows as they are written. Leaves: a `Statistics` that adds to others and travels as JSON in a shard's footer and
in the roll-up of a version. Always holds: merging in any order gives what counting everything at once would.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.documents import Dropped
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.schema import Row

_HLL_BITS = 12
"""4,096 registers: a standard error of 1.04 / sqrt(4096) = 1.6% (Flajolet et al., 2007)."""

_EXACT_BITS = 12
"""Lengths keep this many leading bits: exact below 4,096, within 0.025% above."""

MODALITIES = tuple(m.label for m in Modality)


def length_bin(length: int) -> int:
    """The bin of a length, which is the smallest length in it."""
    drop = max(0, length.bit_length() - _EXACT_BITS)
    return length >> drop << drop


@dataclass(kw_only=True)
class SourceCounts:
    """What one source gave."""

    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents that a filter of the recipe took out, by filter; they are not among `documents`."""


@dataclass(kw_only=True)
class Statistics:
    """Counts over some rows of one vocabulary."""

    text_counts: NDArray[np.int64]
    """[text_vocab_size], special tokens included."""
    image_counts: NDArray[np.int64]
    """[image_codebook_size]."""
    audio_counts: NDArray[np.int64]
    """[K, audio_codebook_size]."""
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by `length_bin` of their number of tokens."""
    span_lengths: dict[str, Counter[int]] = field(default_factory=lambda: {m: Counter() for m in MODALITIES})
    """Spans by modality and `length_bin` of their number of codes."""
    spans_per_document: Counter[int] = field(default_factory=Counter)
    distinct_registers: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1 << _HLL_BITS, np.uint8))
    """HyperLogLog registers over the content hashes."""

    @classmethod
    def empty(cls, vocabulary: Vocabulary) -> Self:
        return cls(
            text_counts=np.zeros(vocabulary.text_vocab_size, np.int64),
            image_counts=np.zeros(vocabulary.image_codebook_size, np.int64),
            audio_counts=np.zeros((vocabulary.audio_codebooks, vocabulary.audio_codebook_size), np.int64),
        )

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.sources.values())

    def tokens(self, modality: str | None = None) -> int:
        """Tokens of a modality, or of all."""
        names = MODALITIES if modality is None else (modality,)
        return sum(s.tokens[name] for s in self.sources.values() for name in names)

    def add(self, rows: Iterable[Row]) -> None:
        """Count some rows."""
        for row in rows:
            sequence = row.sequence
            source = self.sources.setdefault(row.source.partition("/")[0], SourceCounts())
            source.documents += 1
            for modality, counts in zip(
                Modality, (self.text_counts, self.image_counts, self.audio_counts.reshape(-1)), strict=True
            ):
                ids = sequence.token_ids[sequence.modality_ids == modality]
                source.tokens[modality.label] += len(ids)
                if len(ids):
                    np.add.at(counts, ids, 1)
            self.lengths[length_bin(len(sequence.token_ids))] += 1
            self.spans_per_document[len(sequence.spans)] += 1
            for span in sequence.spans:
                self.span_lengths[span.modality.label][length_bin(span.length)] += 1
            self._add_distinct(row.content_hash)

    def drop(self, dropped: Dropped) -> None:
        """Count a document that a filter took out."""
        counts = self.sources.setdefault(dropped.source.partition("/")[0], SourceCounts()).dropped
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1

    def merge(self, other: Statistics) -> None:
        """Add another's counts to these."""
        self.text_counts += other.text_counts
        self.image_counts += other.image_counts
        self.audio_counts += other.audio_counts
        for name, theirs in other.sources.items():
            mine = self.sources.setdefault(name, SourceCounts())
            mine.documents += theirs.documents
            for modality in MODALITIES:
                mine.tokens[modality] += theirs.tokens[modality]
            for reason, count in theirs.dropped.items():
                mine.dropped[reason] = mine.dropped.get(reason, 0) + count
        self.lengths.update(other.lengths)
        self.spans_per_document.update(other.spans_per_document)
        for modality in MODALITIES:
            self.span_lengths[modality].update(other.span_lengths[modality])
        np.maximum(self.distinct_registers, other.distinct_registers, out=self.distinct_registers)

    @property
    def distinct_documents(self) -> int:
        """Documents of distinct content, estimated (HyperLogLog with linear counting for small numbers)."""
        registers = self.distinct_registers.astype(np.float64)
        m = len(registers)
        estimate = 0.7213 / (1 + 1.079 / m) * m * m / float(np.exp2(-registers).sum())
        zeros = int(np.count_nonzero(self.distinct_registers == 0))
        if estimate <= 2.5 * m and zeros:
            estimate = m * math.log(m / zeros)
        return min(round(estimate), self.documents)

    def _add_distinct(self, content_hash: str) -> None:
        value = int(content_hash[:16], 16)
        index = value >> (64 - _HLL_BITS)
        rest = value & ((1 << (64 - _HLL_BITS)) - 1)
        rank = 64 - _HLL_BITS - rest.bit_length() + 1
        self.distinct_registers[index] = max(int(self.distinct_registers[index]), rank)

    def to_json(self) -> dict[str, Any]:
        return {
            "text_counts": _pack(self.text_counts),
            "image_counts": _pack(self.image_counts),
            "audio_counts": _pack(self.audio_counts),
            "audio_codebooks": self.audio_counts.shape[0],
            "sources": {n: asdict(s) for n, s in self.sources.items()},
            "lengths": _counter_json(self.lengths),
            "span_lengths": {m: _counter_json(c) for m, c in self.span_lengths.items()},
            "spans_per_document": _counter_json(self.spans_per_document),
            "distinct_registers": _pack(self.distinct_registers),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        audio = _unpack(values["audio_counts"], np.int64)
        codebooks = int(values["audio_codebooks"])
        return cls(
            text_counts=_unpack(values["text_counts"], np.int64),
            image_counts=_unpack(values["image_counts"], np.int64),
            audio_counts=audio.reshape(codebooks, -1 if codebooks else 0),
            sources={n: SourceCounts(**s) for n, s in values["sources"].items()},
            lengths=_counter(values["lengths"]),
            span_lengths={m: _counter(values["span_lengths"][m]) for m in MODALITIES},
            spans_per_document=_counter(values["spans_per_document"]),
            distinct_registers=_unpack(values["distinct_registers"], np.uint8),
        )


def quantile(counts: Counter[int], q: float) -> int:
    """The smallest value such that at least a share `q` of the counted things is no larger."""
    total = sum(counts.values())
    needed = max(1, math.ceil(q * total))
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    return 0


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Entropy of the empirical distribution in bits; 0 where nothing was counted."""
    total = counts.sum()
    if not total:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum())


def _pack(values: NDArray[Any]) -> str:
    return base64.b85encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()


def _unpack(text: str, dtype: Any) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=dtype).copy()


def _counter_json(counts: Counter[int]) -> dict[str, int]:
    return {str(k): counts[k] for k in sorted(counts)}


def _counter(values: Mapping[str, int]) -> Counter[int]:
    return Counter({int(k): v for k, v in values.items()})
