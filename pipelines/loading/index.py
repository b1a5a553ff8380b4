"""What the loader knows of a dataset before it reads a single token.

Enters: the columns `source`, `num_tokens` and, for long documents with media, `spans`. Leaves: an `Index` of pieces.
A piece is a document, or part of one that is longer than a training sequence. Always holds: the pieces of a document
cover it without overlap, none is longer than a sequence, and no cut lies inside a media span or its opening tokens.
Of a dataset that drops duplicates, each content is there once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.interleave import MEDIA_OPENING
from pipelines.loading.duplicates import copies
from pipelines.loading.reading import MEDIA_COLUMNS
from pipelines.sequence import Modality, Vocabulary
from pipelines.shards.reader import open_shard
from pipelines.shards.split import is_validation
from pipelines.shards.storage import Storage

if TYPE_CHECKING:
    from pipelines.shards.dataset import Shard

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]


class LoadingError(ValueError):
    """A dataset cannot be trained on as asked, or a saved position does not fit it. The message says what to do."""


class Snapshot(Protocol):
    """What the loader asks of a dataset version; `pipelines.shards.dataset.Dataset` is one."""

    storage: Storage
    vocabulary: Vocabulary
    validation_share: float
    duplicates: str

    @property
    def uri(self) -> str: ...

    @property
    def version(self) -> int: ...

    def shards(self) -> list[Shard]: ...


@dataclass(frozen=True, slots=True)
class Block:
    """One row group of a shard: what is read at once."""

    shard: str
    """File name of the shard."""
    row_group: int
    rows: int
    tokens: int
    """In all rows, whichever split they belong to."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """All pieces of a dataset version, in stored order. Arrays are [pieces] unless they say otherwise."""

    dataset: Snapshot
    sequence_length: int
    blocks: list[Block]
    block: Int32s
    """Index into `blocks`, ascending."""
    row: Int32s
    """Row in the row group."""
    start: Int32s
    """First token in the document."""
    length: Int32s
    """Tokens, 1 to `sequence_length`."""
    ends: Bools
    """Whether the document ends with the piece. The last token of other pieces predicts the first of the next one."""
    validation: Bools
    """Whether the document is held out."""
    duplicates: int
    """Documents of the version that are left out because another one, of either split, has the same content."""
    codebooks: int | None = None
    """A view keeps so many of the first audio codebooks; None keeps all. Lengths and cuts are those of the view."""

    @classmethod
    def build(cls, dataset: Snapshot, sequence_length: int, codebooks: int | None = None) -> Index:
        """Index all documents of the dataset's version.

        Args:
            sequence_length: the most tokens that a piece may have.
            codebooks: how many of the first audio codebooks to keep; None keeps all.

        Raises:
            LoadingError: media spans do not fit the sequence length; it names the longest, its row, and the remedy.
            VocabularyError: the dataset has fewer codebooks.
        """
        view = _View(dataset, codebooks)
        blocks: list[Block] = []
        too_long: list[_TooLong] = []
        parts: list[tuple[NDArray[np.generic], ...]] = [_empty()]
        for shard in dataset.shards():
            for block, part in _read_shard(view, shard, sequence_length, too_long):
                parts.append((np.full(len(part[0]), len(blocks), np.int32), *part))
                blocks.append(block)
        if too_long:
            needed, row_id = max(too_long)
            raise LoadingError(
                f"{dataset.uri} version {dataset.version}, row {row_id}: a media span needs {needed} tokens with its "
                f"opening, but data.sequence_length is {sequence_length} (so it is in {len(too_long):,} rows). Raise it to "
                f"{needed} or more, or tokenize with a smaller cap on pictures or sounds."
            )
        block_ids, row, start, length, ends, validation = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        index = cls(
            dataset=dataset,
            sequence_length=sequence_length,
            blocks=blocks,
            block=block_ids.astype(np.int32),
            row=row.astype(np.int32),
            start=start.astype(np.int32),
            length=length.astype(np.int32),
            ends=ends.astype(np.bool_),
            validation=validation.astype(np.bool_),
            duplicates=0,
            codebooks=view.codebooks,
        )
        return index._distinct() if dataset.duplicates == "drop" else index

    def split(self, *, validation: bool) -> Index:
        """The index of one split alone."""
        return self.only(self.validation == validation)

    def _distinct(self) -> Index:
        """The index without documents whose content another one has."""
        copy = copies(self.dataset.storage, self.blocks)
        rows = np.array([block.rows for block in self.blocks], np.int64)
        document = (np.cumsum(rows) - rows)[self.block] + self.row
        return replace(self.only(~copy[document]), duplicates=int(np.count_nonzero(copy)))

    def only(self, keep: Bools) -> Index:
        """The index of some pieces alone, bool [pieces]."""
        names = ("block", "row", "start", "length", "ends", "validation")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the ids of the batches mean: the dataset's, or that of the view."""
        return _View(self.dataset, self.codebooks).vocabulary

    @cached_property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return int(self.length.sum(dtype=np.int64))

    @cached_property
    def documents(self) -> int:
        """Documents, whole or in pieces."""
        return int(np.count_nonzero(self.ends))

    @cached_property
    def block_bounds(self) -> Int64s:
        """int64 [blocks + 1]: pieces `block_bounds[b]` to `block_bounds[b + 1]` lie in block b."""
        return np.searchsorted(self.block, np.arange(len(self.blocks) + 1)).astype(np.int64)

    @cached_property
    def pieces_per_sequence(self) -> int:
        """How many pieces a packed sequence may hold, so that document boundaries have a fixed shape.

        As many as fit if each is as short as the shortest twentieth: only sequences of shorter ones stay unfilled.
        """
        if not len(self.length):
            return 1
        short = int(np.quantile(self.length, 0.05, method="lower"))
        return -(-self.sequence_length // short)


def _empty() -> tuple[NDArray[np.generic], ...]:
    return (*(np.empty(0, np.int32) for _ in range(4)), *(np.empty(0, np.bool_) for _ in range(2)))


_TooLong = tuple[int, str]
"""Tokens that the longest media span of a row needs, and the row's id."""


class _View:
    """How long documents and spans are with the first codebooks alone."""

    def __init__(self, dataset: Snapshot, codebooks: int | None) -> None:
        self.dataset = dataset
        whole = dataset.vocabulary
        # A view of everything is no view.
        self.codebooks = None if codebooks == whole.audio_codebooks else codebooks
        self.vocabulary = whole if self.codebooks is None else whole.first_codebooks(self.codebooks)
        self._of = whole.audio_codebooks

    def lengths(self, table: pa.Table) -> Int32s:
        """int32 [rows]: tokens of each document."""
        tokens: Int32s = table["num_tokens"].to_numpy()
        return tokens if self.codebooks is None else tokens - self._dropped(table["num_audio"].to_numpy())

    def spans(self, spans: Sequence[dict[str, int]]) -> list[tuple[int, int, int]]:
        """(modality, start, length) of the spans of a document."""
        kept: list[tuple[int, int, int]] = []
        dropped = 0
        for span in spans:
            audio = self.codebooks is not None and span["modality"] == Modality.AUDIO
            less = int(self._dropped(span["length"])) if audio else 0
            kept.append((span["modality"], span["start"] - dropped, span["length"] - less))
            dropped += less
        return kept

    def _dropped(self, audio: Any) -> Any:
        """How many of so many audio tokens go."""
        assert self.codebooks is not None
        return audio // self._of * (self._of - self.codebooks)


def _read_shard(
    view: _View, shard: Shard, sequence_length: int, too_long: list[_TooLong]
) -> Iterator[tuple[Block, tuple[NDArray[np.generic], ...]]]:
    """For each row group: (row, start, length, ends, validation) of its pieces; rows that cannot be cut to `too_long`."""
    columns = ["source", "num_tokens", "num_text", *(["num_audio"] if view.codebooks is not None else [])]
    with open_shard(view.dataset.storage, shard.name) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns, use_threads=False)
            lengths = view.lengths(table)
            held_out = _held_out(table["source"], view.dataset.validation_share)
            with_media = np.flatnonzero((lengths > sequence_length) & (table["num_text"].to_numpy() < lengths))
            cuts: dict[int, list[int]] = {}
            if len(with_media):
                media = file.read_row_group(group, columns=["row_id", *MEDIA_COLUMNS], use_threads=False)
                for row in with_media.tolist():
                    indivisible = _indivisible(view.spans(media["spans"][row].as_py()))
                    needed = max(stop - start for start, stop in indivisible)
                    if needed > sequence_length:
                        too_long.append((needed, media["row_id"][row].as_py()))
                    else:
                        cuts[row] = _cuts(indivisible, int(lengths[row]), sequence_length)
            rows, starts, sizes = _pieces(lengths, sequence_length, cuts)
            block = Block(shard.name, group, len(lengths), int(lengths.sum(dtype=np.int64)))
            yield block, (rows, starts, sizes, starts + sizes == lengths[rows], held_out[rows])


def _held_out(sources: pa.ChunkedArray, share: float) -> Bools:
    encoded = pc.dictionary_encode(sources.combine_chunks())
    held_out = np.array([is_validation(source, share) for source in encoded.dictionary.to_pylist()], np.bool_)
    return held_out[encoded.indices.to_numpy()]


def _pieces(lengths: Int32s, sequence_length: int, cuts: dict[int, list[int]]) -> tuple[Int64s, Int64s, Int64s]:
    """(row, start, length) of all pieces: text is cut at multiples of the sequence length, `cuts` gives the others."""
    counts = -(-lengths.astype(np.int64) // sequence_length)
    counts[list(cuts)] = [len(c) - 1 for c in cuts.values()]
    row = np.repeat(np.arange(len(lengths)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(row)) - first[row]) * sequence_length
    length = np.minimum(sequence_length, lengths[row] - start)
    for index, bounds in cuts.items():
        pieces = slice(first[index], first[index] + counts[index])
        start[pieces], length[pieces] = bounds[:-1], np.diff(bounds)
    return row, start, length


def _indivisible(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """The ranges [start, stop) of a document that no cut may enter: its media spans with their opening tokens.

    Args:
        spans: (modality, start, length) each.
    """
    return [(start - MEDIA_OPENING, start + length) for modality, start, length in spans if modality != Modality.TEXT]


def _cuts(indivisible: list[tuple[int, int]], length: int, sequence_length: int) -> list[int]:
    """Bounds of a document's pieces, 0 and `length` included: each piece as long as it may be.

    Args:
        indivisible: ranges that no cut may enter, none longer than `sequence_length`.
    """
    bounds = [0]
    while (at := bounds[-1]) < length:
        cut = min(at + sequence_length, length)
        for start, stop in indivisible:
            if start < cut < stop:
                cut = start
        bounds.append(cut)
    return bounds
