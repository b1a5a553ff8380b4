"""Captions in fields of a record: found by name, checked, and one of several chosen.

Enters: what a JSON object or a table's row holds. Leaves: texts. Always holds: what is no text where text must be raises
`RecordError`, and null is the same as nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pipelines.corpus.documents import Document
from pipelines.corpus.errors import RecordError
from pipelines.corpus.filters import draw

Captions = Literal["first", "all", "one"]
"""Which of several captions a document takes; `one` is drawn by its row id."""


class FieldMissingError(RecordError):
    """A record has no such field."""

    def __init__(self, name: str, setting: str, place: str, has: Iterable[str]) -> None:
        there = ", ".join(itertools.islice(has, 20)) or "none"
        super().__init__(
            "field: missing", f"{place}: no field {name!r} (it has: {there}); correct {setting} or the record"
        )
        self.name = name
        self.setting = setting


def json_object(data: bytes, place: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RecordError: it holds something else.
    """
    try:
        # Decoded here, because the json module would guess at UTF-16 and UTF-32.
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"{place}: not UTF-8 at byte {error.start}; save it as UTF-8"
        raise RecordError("text: not UTF-8", message) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("json: not valid", f"{place}: not JSON: {error}; write one object") from error
    if not isinstance(record, dict):
        raise RecordError("json: no object", f"{place}: a JSON {type(record).__name__}; write one object")
    return record


def value_of(record: Mapping[str, Any], name: str, setting: str, place: str) -> Any:
    """The value of a field; `a.b` is the field `b` of the object in field `a`, unless a field has that very name.

    Args:
        record: a JSON object, or a row.
        name: of the field.
        setting: that named the field, for errors.
        place: of the record, for errors.

    Raises:
        FieldMissingError: there is none.
    """
    if name in record:
        return record[name]
    value: Any = record
    for key in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            raise FieldMissingError(name, setting, place, sorted(record))
        value = value[key]
    return value


def texts(record: Mapping[str, Any], name: str, setting: str, place: str) -> list[str]:
    """The texts of a field, found as by `value_of`, that holds one, several or none.

    Raises:
        RecordError: there is no such field, or it holds something else.
    """
    value = value_of(record, name, setting, place)
    several = value if isinstance(value, list) else [] if value is None else [value]
    for text in several:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise RecordError(
                "field: wrong type", f"{place}: field {name!r} holds a {kind}, expected text; correct {setting}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = rf"{place}: field {name!r} holds half of a surrogate pair (\ud800 to \udfff); write the whole"
            raise RecordError("text: not Unicode", message) from error
    return list(several)


def chosen(captions: Sequence[str], rule: Captions, seed: int, source: str, position: int) -> Sequence[str]:
    """The captions that the document of this identity takes."""
    if rule == "all" or len(captions) < 2:
        return captions
    if rule == "first":
        return captions[:1]
    row_id = Document(source=source, position=position, spans=()).row_id
    return [captions[int(draw("caption", seed, row_id) * len(captions))]]
