"""The tokens of one row group, as the loader wants them: end to end, of the codebooks that the view keeps.

Enters: a `Block` of an `Index`. Leaves: a `ReadBlock`. Always holds: every byte was checked by `open_shard`, and documents
have the lengths that the index knows them by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.sequence import Modality
from pipelines.shards.reader import open_shard

if TYPE_CHECKING:
    from pipelines.loading.index import Block, Index, Int32s, Int64s

MEDIA_COLUMNS = [f"spans.list.element.{name}" for name in ("modality", "start", "length")]


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """All documents of a row group, whichever split they belong to."""

    token_ids: Int32s
    modality_ids: NDArray[np.int8]
    offsets: Int64s
    """[rows + 1]: document r is tokens `offsets[r]` to `offsets[r + 1]`."""


def read_block(index: Index, block: Block) -> ReadBlock:
    """Read and decode a row group."""
    with open_shard(index.dataset.storage, block.shard) as file:
        table = file.read_row_group(block.row_group, columns=["token_ids", *MEDIA_COLUMNS], use_threads=False)
    tokens = _whole(table["token_ids"])
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    token_ids = tokens.flatten().to_numpy()
    # A quarter of the time that the column `modality_ids` takes; `braid verify` has compared the two.
    modality_ids = _modalities(_whole(table["spans"]), offsets)
    if index.codebooks is None:
        return ReadBlock(token_ids, modality_ids, offsets)
    kept = token_ids < index.codebooks * index.dataset.vocabulary.audio_codebook_size
    kept |= modality_ids != Modality.AUDIO
    before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
    return ReadBlock(token_ids[kept], modality_ids[kept], before[offsets])


def _whole(column: pa.ChunkedArray) -> pa.ListArray:
    # One chunk is what a row group is read into; combining would copy it.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _modalities(spans: pa.ListArray, offsets: Int64s) -> NDArray[np.int8]:
    """The modality of each token: that of the media span that it lies in, else text."""
    total = int(offsets[-1])
    fields = spans.flatten()
    modality = fields.field("modality").to_numpy()
    media = np.flatnonzero(modality != Modality.TEXT)
    if not len(media):
        return np.zeros(total, np.int8)
    counts = np.diff(spans.offsets.to_numpy())
    document = np.repeat(np.arange(len(counts)), counts)[media]
    start = offsets[document] + fields.field("start").to_numpy()[media]
    stop = start + fields.field("length").to_numpy()[media]
    # Runs of text and of media in turn; opening tokens stand between any two media spans.
    runs = np.zeros(2 * len(media) + 1, np.int8)
    runs[1::2] = modality[media]
    bounds = np.concatenate([[0], np.stack([start, stop], axis=1).reshape(-1), [total]])
    return np.repeat(runs, np.diff(bounds))
