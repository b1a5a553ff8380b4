"""What tests of readers share: files, and everything that a source reads of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipelines.corpus.documents import Document, Input, Reject, Slice
from pipelines.corpus.reader import Reader


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def whole(inputs: Iterable[Input]) -> list[Slice]:
    return [Slice(input=item, start=0, stop=item.size) for item in inputs]


def everything(source: Reader) -> list[Document | Reject]:
    return list(source.read(whole(source.inputs())))


def only_reject(source: Reader) -> Reject:
    (reject,) = everything(source)
    assert isinstance(reject, Reject)
    return reject
