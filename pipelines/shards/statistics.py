"""Mergeable statistics of shards: counted once by the worker that writes a shard, added up for ever after.

Enters: rows as they are written. Leaves: a `Statistics` that adds to others and travels as JSON in a shard's footer and
in the roll-up of a version. Always holds: merging in any order gives what counting everything at once would, and so does
merging and subtracting, but for the estimate of distinct documents.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.documents import Dropped, Reject
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.schema import Row

_HLL_BITS = 12
"""4,096 registers: a standard error of 1.04 / sqrt(4096) = 1.6% (Flajolet et al., 2007)."""

_EXACT_BITS = 12
"""Lengths keep this many leading bits: exact below 4,096, within 0.025% above."""

MODALITIES = tuple(m.label for m in Modality)

K = TypeVar("K")


def length_bin(length: int) -> int:
    """The bin of a length, which is the smallest length in it."""
    drop = max(0, length.bit_length() - _EXACT_BITS)
    return length >> drop << drop


@dataclass(kw_only=True)
class SourceCounts:
    """What one source gave."""

    documents: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    raw_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    """UTF-8 bytes of the texts and bytes of the media files that the tokens were made of, of the `weighed` documents."""
    weighed: int = 0
    """Documents whose raw bytes are known: neither what came as tokens nor what an older Braid wrote."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents that a filter of the recipe took out, by filter; they are not among `documents`."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Documents that could not be tokenized, by reason; they are not among `documents` either."""


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
    """Documents by `length_bin` of their number of spans."""
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

    def add(self, rows: Sequence[Row]) -> None:
        """Count some rows."""
        if not rows:
            return
        ids = np.concatenate([row.sequence.token_ids for row in rows])
        modalities = np.concatenate([row.sequence.modality_ids for row in rows])
        for modality, counts in zip(
            Modality, (self.text_counts, self.image_counts, self.audio_counts.reshape(-1)), strict=True
        ):
            counts += np.bincount(ids[modalities == modality], minlength=len(counts))
        for row in rows:
            sequence = row.sequence
            source = self.sources.setdefault(row.source.partition("/")[0], SourceCounts())
            source.documents += 1
            source.weighed += row.raw_bytes is not None
            for modality, raw in zip(Modality, row.raw_bytes or (0, 0, 0), strict=True):
                source.tokens[modality.label] += sequence.count(modality)
                source.raw_bytes[modality.label] += raw
            for span in sequence.spans:
                self.span_lengths[span.modality.label][length_bin(span.length)] += 1
        self.lengths.update(length_bin(len(row.sequence.token_ids)) for row in rows)
        self.spans_per_document.update(length_bin(len(row.sequence.spans)) for row in rows)
        self._add_distinct([row.content_hash for row in rows])

    def drop(self, dropped: Dropped) -> None:
        """Count a document that a filter took out."""
        counts = self.sources.setdefault(dropped.source.partition("/")[0], SourceCounts()).dropped
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1

    def reject(self, reject: Reject) -> None:
        """Count a document that could not be tokenized."""
        counts = self.sources.setdefault(reject.source.partition("/")[0], SourceCounts()).rejected
        counts[reject.reason] = counts.get(reject.reason, 0) + 1

    def merge(self, other: Statistics) -> None:
        """Add another's counts to these."""
        self._count(other, 1)
        np.maximum(self.distinct_registers, other.distinct_registers, out=self.distinct_registers)

    def subtract(self, other: Statistics) -> None:
        """Take counts that were merged before out again.

        The registers of HyperLogLog know no way back: until they are counted anew from the footers, `distinct_documents`
        is an upper bound that still counts contents which are gone.
        """
        self._count(other, -1)

    def _count(self, other: Statistics, sign: int) -> None:
        self.text_counts += sign * other.text_counts
        self.image_counts += sign * other.image_counts
        self.audio_counts += sign * other.audio_counts
        for name, theirs in other.sources.items():
            mine = self.sources.setdefault(name, SourceCounts())
            mine.documents += sign * theirs.documents
            mine.weighed += sign * theirs.weighed
            for modality in MODALITIES:
                mine.tokens[modality] += sign * theirs.tokens[modality]
                mine.raw_bytes[modality] += sign * theirs.raw_bytes[modality]
            _shift(mine.dropped, theirs.dropped, sign)
            _shift(mine.rejected, theirs.rejected, sign)
            if not (mine.documents or mine.dropped or mine.rejected):
                del self.sources[name]
        _shift(self.lengths, other.lengths, sign)
        _shift(self.spans_per_document, other.spans_per_document, sign)
        for modality in MODALITIES:
            _shift(self.span_lengths[modality], other.span_lengths[modality], sign)

    @property
    def distinct_documents(self) -> int:
        """Documents of distinct content, estimated (HyperLogLog with linear counting for small numbers)."""
        return min(_distinct(self.distinct_registers), self.documents)

    def common_documents(self, other: Statistics) -> int:
        """Contents that both have, estimated by inclusion and exclusion: within some 3% of the larger one."""
        both = _distinct(np.maximum(self.distinct_registers, other.distinct_registers))
        most = min(self.distinct_documents, other.distinct_documents)
        return min(max(0, self.distinct_documents + other.distinct_documents - both), most)

    def _add_distinct(self, content_hashes: Sequence[str]) -> None:
        rest_bits = 64 - _HLL_BITS
        for content_hash in content_hashes:
            value = int(content_hash[:16], 16)
            index = value >> rest_bits
            rank = rest_bits - (value & ((1 << rest_bits) - 1)).bit_length() + 1
            if rank > self.distinct_registers[index]:
                self.distinct_registers[index] = rank

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


def _shift(mine: dict[K, int], theirs: Mapping[K, int], sign: int) -> None:
    """Add or take away counts; what is at zero goes, so that equal contents have equal counts."""
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + sign * count
        if not mine[key]:
            del mine[key]


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


def _distinct(registers: NDArray[np.uint8]) -> int:
    m = len(registers)
    estimate = 0.7213 / (1 + 1.079 / m) * m * m / float(np.exp2(-registers.astype(np.float64)).sum())
    zeros = int(np.count_nonzero(registers == 0))
    return round(m * math.log(m / zeros) if estimate <= 2.5 * m and zeros else estimate)


def _pack(values: NDArray[Any]) -> str:
    return base64.b85encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 6)).decode()


def _unpack(text: str, dtype: Any) -> NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=dtype).copy()


def _counter_json(counts: Counter[int]) -> dict[str, int]:
    return {str(k): counts[k] for k in sorted(counts)}


def _counter(values: Mapping[str, int]) -> Counter[int]:
    return Counter({int(k): v for k, v in values.items()})
