"""The raw documents that rows were made of, as the tokenizers saw them, where they can still be read.

Enters: rows, and the recipe and units that the dataset keeps. Leaves: spans to compare with the decoded ones. Always holds:
an original has the very content hash that its row has; anything else is said to be gone, changed or out of reach.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pipelines.corpus.documents import Document
from pipelines.corpus.errors import CorpusError, RecordError, StoreError, TransientError
from pipelines.corpus.filters import Filters
from pipelines.corpus.reader import Reader
from pipelines.corpus.sources import Source
from pipelines.decode import DecodedSpan
from pipelines.rows import StoredRow
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.reader import read_footer
from pipelines.tokenize.history import last_settings, newest_recipe
from pipelines.tokenize.prepare import Prepared, prepare
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import WorkUnit

_OUT_OF_REACH = (CorpusError, RecordError, StoreError, TransientError, OSError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Original:
    """What a row was made of, or why it is not there."""

    spans: tuple[DecodedSpan, ...] = ()
    """Texts, pictures and sounds as they entered their tokenizers, in order; empty if there is a `missing`."""
    missing: str = ""


def find_originals(
    dataset: Dataset, rows: Sequence[StoredRow], tokenizers: Tokenizers, *, timeout_s: float = 30.0
) -> list[Original]:
    """Look for the originals of some rows, in the order of the rows.

    Args:
        timeout_s: after so long the rest is not looked for, because a row may lie deep in a large archive.
    """
    until = time.monotonic() + timeout_s
    found: dict[str, Original] = {}
    by_shard: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for stored in rows:
        by_shard[stored.shard].append(stored.values)
    settings, recipe = last_settings(dataset.storage), newest_recipe(dataset.storage)
    readers: dict[str, Reader] = {}
    for name, wanted in by_shard.items():
        if time.monotonic() > until:
            break
        unit = WorkUnit.from_rows(json.loads(read_footer(dataset.storage, name)["unit"])["rows"])
        if unit.source not in readers:
            reader: Reader = TypeAdapter(Source).validate_python(settings[unit.source])
            readers[unit.source] = reader.bound(dataset.vocabulary, recipe.sequence_length)
        try:
            documents = _read(readers[unit.source], unit, {row["row_id"] for row in wanted}, until)
            for row in wanted:
                document = documents.get(row["row_id"])
                if document is None:
                    missing = "not found in its input any more" if time.monotonic() < until else ""
                elif document.content_hash != row["content_hash"]:
                    missing = "its input has changed since"
                else:
                    prepared = prepare(document, Filters(), recipe.tokenizers, tokenizers.shapes)
                    if isinstance(prepared, Prepared):
                        found[row["row_id"]] = Original(spans=tuple(_spans(prepared, tokenizers)))
                        continue
                    missing = f"cannot be prepared now: {prepared.reason}"
                if missing:
                    found[row["row_id"]] = Original(missing=missing)
        except _OUT_OF_REACH as error:
            found |= {row["row_id"]: Original(missing=str(error)) for row in wanted if row["row_id"] not in found}
    late = Original(missing=f"not reached within {timeout_s:g} s")
    return [found.get(stored.values["row_id"], late) for stored in rows]


def _read(reader: Reader, unit: WorkUnit, wanted: set[str], until: float) -> dict[str, Document]:
    """The documents of a unit that are wanted, by row id."""
    found: dict[str, Document] = {}
    for piece in unit.slices:
        if len(found) == len(wanted) or time.monotonic() > until:
            break
        for item in reader.read([piece]):
            if isinstance(item, Document) and item.row_id in wanted:
                found[item.row_id] = item
            if len(found) == len(wanted) or time.monotonic() > until:
                break
    return found


def _spans(prepared: Prepared, tokenizers: Tokenizers) -> Iterable[DecodedSpan]:
    for part in prepared.parts:
        if part.encoded:
            continue
        if isinstance(part.payload, str):
            yield DecodedSpan(modality=part.modality, text=part.payload, uri=part.uri)
        elif part.modality is Modality.IMAGE:
            yield DecodedSpan(modality=part.modality, pixels=part.payload, uri=part.uri)
        elif tokenizers.audio:
            waveform = np.asarray(part.payload, np.float32)
            rate = tokenizers.audio.sample_rate_hz
            yield DecodedSpan(modality=part.modality, waveform=waveform, sample_rate_hz=rate, uri=part.uri)


def beside(decoded: Sequence[DecodedSpan], original: Sequence[DecodedSpan]) -> list[DecodedSpan | None]:
    """For each decoded picture or sound its original; None for texts, and where there is none."""
    pairs: list[DecodedSpan | None] = []
    media = {m: iter([s for s in original if s.modality is m]) for m in Modality}
    for span in decoded:
        pairs.append(None if span.modality is Modality.TEXT else next(media[span.modality], None))
    return pairs
