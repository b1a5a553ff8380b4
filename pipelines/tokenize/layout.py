"""Windows of encoded documents to rows.

Enters: the documents of a unit, window by window, and the codes of their media and texts. Leaves: rows, and what stands for a
document that has none, in the order of the corpus. Always holds: a unit has no two rows of one identity. No network is needed
here, so what lays out and writes starts without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from pipelines.corpus.documents import Dropped, Reject
from pipelines.interleave import EncodedSpan, interleave
from pipelines.sequence import Modality, SequenceError, Vocabulary
from pipelines.shards.schema import Row
from pipelines.tokenize.prepare import Item, Prepared
from pipelines.tokenize.windows import Items, items_of

Result = Row | Reject | Dropped
Codes = dict[Modality, list[np.ndarray]]
"""Of a window's media and texts, in their order."""
Encoded = tuple[list[Items], Codes]
"""The items of a window's chunks, and its codes."""


def rows_of(windows: Iterable[Encoded], vocabulary: Vocabulary) -> Iterator[Result]:
    """The rows of a unit, what had to be rejected and what a filter took out."""
    seen: set[str] = set()
    for chunks, codes in windows:
        for result in laid_out(items_of(chunks), codes, vocabulary):
            if isinstance(result, Row):
                if result.row_id in seen:
                    yield _twice(result)
                    continue
                seen.add(result.row_id)
            yield result


def laid_out(window: list[Item], codes: Codes, vocabulary: Vocabulary) -> Iterator[Result]:
    """Each document of a window as a row, or as what stands for it."""
    left = {modality: iter(parts) for modality, parts in codes.items()}
    for item in window:
        if not isinstance(item, Prepared):
            yield item
            continue
        spans = [
            EncodedSpan(
                modality=part.modality,
                codes=np.asarray(part.payload) if part.encoded else next(left[part.modality]),
                uri=part.uri,
            )
            for part in item.parts
        ]
        # A normalizer may leave nothing of a text, such as one of zero-width spaces.
        yield _row(item, [span for span in spans if span.codes.size], vocabulary)


def _row(document: Prepared, spans: list[EncodedSpan], vocabulary: Vocabulary) -> Row | Reject:
    if not spans:
        return Reject(
            source=document.source,
            position=document.position,
            reason="text: empty",
            error=f"{document.source}: the text tokenizer makes no piece of this text; remove the document",
        )
    try:
        sequence = interleave(vocabulary, spans)
    except SequenceError as error:
        # Only codes that came as such can break the contract.
        return Reject(
            source=document.source,
            position=document.position,
            reason="tokens: not a document",
            error=f"{document.source}: {error}",
        )
    return Row(
        row_id=document.row_id,
        content_hash=document.content_hash,
        source=document.source,
        sequence=sequence,
        raw_bytes=document.raw_bytes,
    )


def _twice(row: Row) -> Reject:
    return Reject(
        source=row.source,
        position=0,
        reason="row id: twice",
        error=f"{row.source}: a document with this identity came before it; give each record an id of its own",
    )
