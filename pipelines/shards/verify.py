"""Read a whole dataset version and check everything that can be wrong with it.

Enters: a `Dataset`. Leaves: `Fault`s, each naming shard and row. Always holds: what passes here has files of the committed
size with good checksums, the schema of this format, ids in range, the grammar of `pipelines.sequence`, true counts, row ids
that occur once, and a quarantine that can be read. Memory: 16 bytes
a row, while the ids are sorted.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.fs import FileType

from pipelines.sequence import Modality, SequenceError, Vocabulary, parse
from pipelines.shards.dataset import Dataset, Shard
from pipelines.shards.reader import ShardError, open_shard
from pipelines.shards.schema import SCHEMA
from pipelines.shards.storage import Storage
from pipelines.shards.writer import REJECT_SCHEMA

# What readers raise on damaged bytes: that is the finding, and the next file is still worth a look.
_DAMAGE = (ShardError, OSError, pa.ArrowException)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong."""

    shard: str
    row: str
    """Id of the row; empty where the whole shard is meant."""
    what: str


def verify(dataset: Dataset) -> Iterator[Fault]:
    """Check every shard of a version and its rejects; nothing yielded means that all is well."""
    shards = dataset.shards()
    wrong = _wrong_sizes(dataset.storage.below("shards"), {shard.name: shard.size for shard in shards})
    yield from (Fault(shard=name, row="", what=what) for name, what in wrong.items())
    whole = [shard for shard in shards if shard.name not in wrong]
    ids: list[NDArray[np.uint64]] = []
    for shard in whole:
        try:
            yield from _verify_shard(dataset, shard, ids)
        except _DAMAGE as error:
            yield Fault(shard=shard.name, row="", what=str(error))
    yield from _repeated(dataset, whole, ids)
    yield from _verify_quarantine(dataset)


def _wrong_sizes(folder: Storage, committed: Mapping[str, int]) -> dict[str, str]:
    """What is wrong with the files that are not there or not of their committed size."""
    infos = zip(committed, folder.info(committed.keys()), strict=True)
    found = {name: info.size for name, info in infos if info.type == FileType.File}
    missing = {name: "the file is missing" for name in committed if name not in found}
    return missing | {
        name: f"the file has {size} bytes, but its commit says {committed[name]}"
        for name, size in found.items()
        if size != committed[name]
    }


def _verify_shard(dataset: Dataset, shard: Shard, ids: list[NDArray[np.uint64]]) -> Iterator[Fault]:
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
            ids.append(_short(batch.column("row_id").to_pylist()))
            yield from _verify_batch(dataset.vocabulary, shard.name, batch)
    if rows != shard.rows:
        yield Fault(shard=shard.name, row="", what=f"holds {rows} rows, but its commit says {shard.rows}")


def _verify_batch(vocabulary: Vocabulary, shard: str, batch: pa.RecordBatch) -> Iterator[Fault]:
    counts = [batch.column(f"num_{name}").to_pylist() for name in ("tokens", *(m.label for m in Modality))]
    spans = batch.column("spans").to_pylist()
    for index, row_id in enumerate(batch.column("row_id").to_pylist()):
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


def _repeated(dataset: Dataset, shards: list[Shard], ids: list[NDArray[np.uint64]]) -> Iterator[Fault]:
    """The row ids that occur more than once: short forms that repeat make candidates, a second look names them."""
    every = np.sort(np.concatenate([np.empty(0, np.uint64), *ids]))
    candidates = set(every[1:][every[1:] == every[:-1]].tolist())
    if not candidates:
        return
    seen: dict[str, str] = {}
    for shard in shards:
        # Damage was reported at the first look.
        with contextlib.suppress(*_DAMAGE), open_shard(dataset.storage, shard.name) as file:
            for batch in file.iter_batches(columns=["row_id"]):
                names = batch.column("row_id").to_pylist()
                for row_id, short in zip(names, _short(names).tolist(), strict=True):
                    if short in candidates:
                        if row_id in seen:
                            what = f"the row id occurs twice, first in {seen[row_id]}"
                            yield Fault(shard=shard.name, row=row_id, what=what)
                        seen.setdefault(row_id, shard.name)


def _short(row_ids: list[str]) -> NDArray[np.uint64]:
    """64 bits of each row id: a hundred million ids then take 0.8 GB."""
    digests = (hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in row_ids)
    return np.frombuffer(b"".join(digests), np.uint64)


def _verify_quarantine(dataset: Dataset) -> Iterator[Fault]:
    files = dataset.quarantine.files(dataset.names)
    wrong = _wrong_sizes(dataset.storage.below("quarantine"), {file.name: file.size for file in files})
    yield from (Fault(shard=f"quarantine/{name}", row="", what=what) for name, what in wrong.items())
    for file in files:
        if file.name in wrong:
            continue
        try:
            rows = dataset.quarantine.read(file)
        except _DAMAGE as error:
            yield Fault(shard=f"quarantine/{file.name}", row="", what=str(error))
            continue
        if rows.schema != REJECT_SCHEMA or len(rows) != file.rows:
            what = f"holds {len(rows)} rejects of columns {rows.schema.names}, but its commit says {file.rows}"
            yield Fault(shard=f"quarantine/{file.name}", row="", what=what)
