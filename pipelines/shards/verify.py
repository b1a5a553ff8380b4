"""Read a whole dataset version and check everything that can be wrong with it.

Enters: a `Dataset`. Leaves: `Fault`s, each naming shard and row. Always holds: what passes here has good checksums, the
schema of this format, ids in range, the grammar of `pipelines.sequence`, true counts, and row ids that occur once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from pipelines.sequence import Modality, SequenceError, Vocabulary, parse
from pipelines.shards.dataset import Dataset, Shard
from pipelines.shards.reader import ShardError, open_shard
from pipelines.shards.schema import SCHEMA


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong."""

    shard: str
    row: str
    """Id of the row; empty where the whole shard is meant."""
    what: str


def verify(dataset: Dataset) -> Iterator[Fault]:
    """Check every shard of a version; nothing yielded means that all is well."""
    seen: dict[str, str] = {}
    for shard in dataset.shards():
        try:
            yield from _verify_shard(dataset, shard, seen)
        except (ShardError, OSError, pa.ArrowException) as error:
            # What the reader raises on damaged bytes is the finding; the next shard is still worth a look.
            yield Fault(shard=shard.name, row="", what=str(error))


def _verify_shard(dataset: Dataset, shard: Shard, seen: dict[str, str]) -> Iterator[Fault]:
    rows = 0
    with open_shard(dataset.storage, shard.name) as file:
        footer = {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items()}
        if footer.get("braid.fingerprint") != dataset.vocabulary.fingerprint:
            yield Fault(shard=shard.name, row="", what="made with another vocabulary than the dataset's")
        if not file.schema_arrow.remove_metadata().equals(SCHEMA):
            yield Fault(shard=shard.name, row="", what="its columns are not those of this format")
            return
        for batch in file.iter_batches(batch_size=1024):
            rows += len(batch)
            yield from _verify_batch(dataset.vocabulary, shard.name, batch, seen)
    if rows != shard.rows:
        yield Fault(shard=shard.name, row="", what=f"holds {rows} rows, but its commit says {shard.rows}")


def _verify_batch(vocabulary: Vocabulary, shard: str, batch: pa.RecordBatch, seen: dict[str, str]) -> Iterator[Fault]:
    counts = [batch.column(f"num_{name}").to_pylist() for name in ("tokens", *(m.label for m in Modality))]
    spans = batch.column("spans").to_pylist()
    for index, row_id in enumerate(batch.column("row_id").to_pylist()):
        if row_id in seen:
            yield Fault(shard=shard, row=row_id, what=f"the row id occurs twice, first in {seen[row_id]}")
        seen[row_id] = shard
        token_ids = batch.column("token_ids")[index].values.to_numpy()
        modality_ids = batch.column("modality_ids")[index].values.to_numpy()
        try:
            parsed = parse(vocabulary, token_ids, modality_ids)
        except SequenceError as error:
            yield Fault(shard=shard, row=row_id, what=str(error))
            continue
        stored = [(s["modality"], s["start"], s["length"], s["rows"], s["columns"]) for s in spans[index]]
        if stored != [(s.modality, s.start, s.length, s.rows, s.columns) for s in parsed]:
            yield Fault(shard=shard, row=row_id, what="column spans does not say where the spans of the tokens are")
        true = [len(token_ids), *(int((modality_ids == m).sum()) for m in Modality)]
        if [column[index] for column in counts] != true:
            yield Fault(shard=shard, row=row_id, what=f"counts {[c[index] for c in counts]} should be {true}")
