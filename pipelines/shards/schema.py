"""The row of a token dataset, as Arrow types. One row is one document.

Always holds: `len(token_ids) == len(modality_ids) == num_tokens == num_text + num_image + num_audio`, and the tokens
follow the grammar of `pipelines.sequence`.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.interleave import Sequence
from pipelines.sequence import Modality

FORMAT_VERSION = 1
"""Stands in the table properties; raised when the schema or the layout of the dataset changes."""

SPAN_TYPE = pa.struct(
    [
        pa.field("modality", pa.int8()),
        pa.field("start", pa.int32()),
        pa.field("length", pa.int32()),
        pa.field("rows", pa.int32()),
        pa.field("columns", pa.int32()),
        pa.field("uri", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("source", pa.string()),
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32()))),
        pa.field("modality_ids", pa.list_(pa.field("element", pa.int8()))),
        pa.field("spans", pa.list_(pa.field("element", SPAN_TYPE))),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_text", pa.int32()),
        pa.field("num_image", pa.int32()),
        pa.field("num_audio", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tokenized document with its identity."""

    row_id: str
    content_hash: str
    source: str
    sequence: Sequence
    raw_bytes: tuple[int, int, int] | None = None
    """Bytes of its raw texts, pictures and sounds, for the statistics alone; None where it came as tokens."""


def to_arrow(rows: Rows[Row]) -> pa.RecordBatch:
    """Rows as one Arrow batch of `SCHEMA`."""
    sequences = [row.sequence for row in rows]
    lengths = np.array([len(s.token_ids) for s in sequences], np.int32)
    spans = [span for s in sequences for span in s.spans]
    columns: list[Any] = [
        pa.array([row.row_id for row in rows], pa.string()),
        pa.array([row.content_hash for row in rows], pa.string()),
        pa.array([row.source for row in rows], pa.string()),
        _lists("token_ids", np.concatenate([s.token_ids for s in sequences]), lengths),
        _lists("modality_ids", np.concatenate([s.modality_ids for s in sequences]), lengths),
        _lists(
            "spans",
            pa.StructArray.from_arrays(
                [pa.array([getattr(span, f.name) for span in spans], f.type) for f in SPAN_TYPE], fields=list(SPAN_TYPE)
            ),
            np.array([len(s.spans) for s in sequences], np.int32),
        ),
        pa.array(lengths),
        *(pa.array([s.count(m) for s in sequences], pa.int32()) for m in Modality),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(name: str, values: Any, lengths: NDArray[np.int32]) -> pa.ListArray:
    """A list column of SCHEMA from its values end to end."""
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCHEMA.field(name).type)
