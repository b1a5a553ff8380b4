"""The row of a token dataset, as Arrow types. One row is one document.

Always holds: `len(token_ids) == len(modality_ids) == num_tokens == num_text + num_image + num_audio`, and the tokens
follow the grammar of `pipelines.sequence`.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

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


def to_arrow(rows: Rows[Row]) -> pa.RecordBatch:
    """Rows as one Arrow batch of `SCHEMA`."""
    sequences = [row.sequence for row in rows]
    columns: list[Any] = [
        pa.array([row.row_id for row in rows], pa.string()),
        pa.array([row.content_hash for row in rows], pa.string()),
        pa.array([row.source for row in rows], pa.string()),
        pa.array([s.token_ids for s in sequences], SCHEMA.field("token_ids").type),
        pa.array([s.modality_ids for s in sequences], SCHEMA.field("modality_ids").type),
        pa.array(
            [
                [
                    {
                        "modality": int(span.modality),
                        "start": span.start,
                        "length": span.length,
                        "rows": span.rows,
                        "columns": span.columns,
                        "uri": span.uri,
                    }
                    for span in s.spans
                ]
                for s in sequences
            ],
            SCHEMA.field("spans").type,
        ),
        pa.array([len(s.token_ids) for s in sequences], pa.int32()),
        *(pa.array([s.count(m) for s in sequences], pa.int32()) for m in Modality),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
