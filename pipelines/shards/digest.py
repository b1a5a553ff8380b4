"""The identity of a dataset's content: equal for datasets that hold the same rows, however they were made."""

from __future__ import annotations

import hashlib

from pipelines.shards.dataset import Dataset


def dataset_hash(dataset: Dataset) -> str:
    """sha256 over all rows sorted by row id, 64 hexadecimal digits.

    The uris of spans are left out: they say where the raw files lay, not what the rows mean.
    """
    digests: list[tuple[str, bytes]] = []
    columns = ["row_id", "content_hash", "source", "token_ids", "modality_ids"]
    for batch in dataset.read(columns):
        lists = [batch.column(name) for name in ("token_ids", "modality_ids")]
        rows = zip(*(batch.column(name).to_pylist() for name in columns[:3]), *lists, strict=True)
        for row_id, content_hash, source, token_ids, modality_ids in rows:
            digest = hashlib.sha256(f"{row_id}\n{content_hash}\n{source}\n".encode())
            digest.update(token_ids.values.to_numpy().tobytes())
            digest.update(modality_ids.values.to_numpy().tobytes())
            digests.append((row_id, digest.digest()))
    return hashlib.sha256(b"".join(digest for _, digest in sorted(digests))).hexdigest()
