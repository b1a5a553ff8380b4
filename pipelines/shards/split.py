"""Which split a document belongs to: a hash of its source identity, so the split stays as the dataset grows."""

from __future__ import annotations

import hashlib


def is_validation(source: str, share: float) -> bool:
    """Whether a document of this source identity is held out, for a validation share in 0..1."""
    digest = hashlib.blake2b(source.encode(), digest_size=8, person=b"braid-split").digest()
    return int.from_bytes(digest, "big") < share * 2**64
