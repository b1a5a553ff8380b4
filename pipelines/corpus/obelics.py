"""Web pages in the layout of OBELICS: two lists of equal length, in each place either a picture or a text.

Enters: Parquet or JSON lines with `images` and `texts`. Leaves: one document a page. Always holds: pictures and texts
keep their order.

Source: OBELICS (Laurençon et al., 2023).
"""

from __future__ import annotations

import hashlib
import posixpath
import string
from collections.abc import Iterator
from typing import Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

from pydantic import field_validator

from pipelines.corpus.captions import texts
from pipelines.corpus.documents import RawSpan, joined
from pipelines.corpus.errors import RecordError
from pipelines.corpus.interleaved import InterleavedReader
from pipelines.corpus.media_types import ending
from pipelines.corpus.record_files import Record, field
from pipelines.sequence import Modality


class ObelicsSource(InterleavedReader):
    """Reader `obelics`. A picture is its bytes, a struct of `bytes` and `path`, or its URL or path in the folder `media`."""

    decides_rows: ClassVar[frozenset[str]] = InterleavedReader.decides_rows | {"media_name"}

    reader: Literal["obelics"]
    media_name: str = "{name}"
    """Name of a picture's file in `media`. `{name}` is the last part of its URL's path, or the whole path where there is
    no URL; `{extension}` the ending of that with its dot, lower case; `{sha256}` 64 hexadecimal digits over the URL."""

    @field_validator("media_name")
    @classmethod
    def _known(cls, template: str) -> str:
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(f"{template!r}: {error}") from error
        if not used or used - {"name", "extension", "sha256"}:
            raise ValueError(
                f"{template!r} must be made of {{name}}, {{extension}} and {{sha256}}, such as {{sha256}}.jpg"
            )
        return template

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"images", "texts"})

    def spans(self, source: str, record: Record, place: str) -> tuple[RawSpan, ...]:
        images, written = (field(record, name, "the record", place, list) for name in ("images", "texts"))
        if len(images) != len(written):
            message = f"{place}: {len(images)} images and {len(written)} texts; the two lists must be of equal length"
            raise RecordError("obelics: unequal lists", message)
        spans = joined(self._spans(source, images, written, place))
        if not spans:
            raise RecordError("document: empty", f"{place}: no picture and no text; leave such records out")
        return spans

    def _spans(self, source: str, images: list[Any], written: list[Any], place: str) -> Iterator[RawSpan]:
        for index, (image, text) in enumerate(zip(images, written, strict=True)):
            here = f"{place}, place {index}"
            if (image is None) == (text is None):
                both = "neither a picture nor" if image is None else "both a picture and"
                raise RecordError("obelics: not one of two", f"{here}: {both} a text; one of the two must be null")
            if image is None:
                (known,) = texts({"texts": [text]}, "texts", "the record", here)
                yield RawSpan(modality=Modality.TEXT, text=known, uri=source)
            else:
                yield from self._image(source, image, here)

    def _image(self, source: str, image: Any, place: str) -> list[RawSpan]:
        data, named = image, None
        if isinstance(image, dict):
            data, named = image.get("bytes"), image.get("path")
        elif isinstance(image, str):
            data, named = None, image
        if named is not None:
            (named,) = texts({"images": [named]}, "images", "the record", place)
        if data is None and named:
            return self.picture(self._file_name(named, place), named, place)
        if not isinstance(data, bytes):
            message = f"{place}: the picture is a {type(image).__name__} without bytes, URL or path"
            raise RecordError("field: wrong type", message)
        if len(data) > self.max_file_mb * 1e6:
            message = f"{place}: a picture over max_file_mb = {self.max_file_mb:g}; leave it out or raise that limit"
            raise RecordError("file: too large", message)
        return [RawSpan(modality=Modality.IMAGE, data=data, uri=named or source)]

    def _file_name(self, named: str, place: str) -> str:
        name = named
        if "://" in named:
            try:
                name = unquote(posixpath.basename(urlsplit(named).path))
            except ValueError as error:
                raise RecordError(
                    "media: not a URL", f"{place}: {named!r:.200}: {error}; correct the record"
                ) from error
        sha256 = hashlib.sha256(named.encode()).hexdigest()
        return self.media_name.format(name=name, extension=ending(name), sha256=sha256)
