"""Documents that are tokenized already: ids of the recipe's own tokenizers, made elsewhere or for another dataset.

Enters: Parquet or JSON lines with ids, or another Braid dataset, and what the ids were made with. Leaves: one document a
record, its spans as codes. Always holds: a source whose ids were made with other tokenizers is refused before any work, and
every id lies in its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import PrivateAttr, model_validator

from pipelines.corpus.captions import texts, value_of
from pipelines.corpus.documents import Input, RawSpan, joined
from pipelines.corpus.errors import CorpusError, RecordError
from pipelines.corpus.files import find_files, stamp
from pipelines.corpus.record_files import Record, TableReader, field
from pipelines.interleave import EncodedSpan, deinterleave, sequence_length
from pipelines.recipe import Settings
from pipelines.sequence import Ids, Modality, SequenceError, Vocabulary, VocabularyError

_MODALITIES = {modality.label: modality for modality in Modality}


class MadeWith(Settings):
    """The tokenizers that ids were made with; those of modalities that do not occur may be left out."""

    text_sha256: str | None = None
    """Of the SentencePiece model file, as `braid stats --json` shows it for a dataset."""
    image_sha256: str | None = None
    audio_sha256: str | None = None
    fingerprint: str | None = None
    """Of a Braid dataset: all tokenizers and all preprocessing."""

    @model_validator(mode="after")
    def _states_something(self) -> Self:
        if not any(value for _, value in self):
            raise ValueError(
                "state what the ids were made with: fingerprint, or text_sha256, image_sha256, audio_sha256"
            )
        return self

    def covers(self, modality: Modality) -> bool:
        """Whether ids of the modality may occur."""
        return bool(self.fingerprint or getattr(self, f"{modality.label}_sha256"))


class TokenizedSource(TableReader):
    """Reader `tokenized`."""

    decides_rows: ClassVar[frozenset[str]] = TableReader.decides_rows | {"content", "token_ids_field", "made_with"}

    reader: Literal["tokenized"]
    content: Literal["text", "spans", "sequences"]
    """`text`: a field of text ids without special tokens. `spans`: a field `spans` that lists objects of `modality` (text,
    image or audio) and `codes`: ids of a text, rows of an image, frames of K codes of a sound; a text may stand as `text`
    instead. `sequences`: `token_ids` and `modality_ids` as Braid's own shards have them; of a dataset's folder its newest
    version is read."""
    token_ids_field: str = "token_ids"
    """Field of text ids, for `content: text`."""
    made_with: MadeWith

    _vocabulary: Vocabulary | None = PrivateAttr(None)
    _sequence_length: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _states_the_text(self) -> Self:
        if self.content != "spans" and not self.made_with.covers(Modality.TEXT):
            raise ValueError(f"made_with must state text_sha256 or fingerprint for content: {self.content}")
        return self

    @property
    def has_media(self) -> bool:
        # They come as codes.
        return False

    def bound(self, vocabulary: Vocabulary, sequence_length: int) -> Self:
        for key, stated in self.made_with:
            if stated and stated != (actual := getattr(vocabulary, key)):
                raise VocabularyError(
                    f"sources: {self.name}: made_with.{key} is {stated}, but this recipe's is {actual or 'none'}; use the "
                    "tokenizers that the ids were made with, or tokenize the raw data again"
                )
        bound = self.model_copy()
        bound._vocabulary, bound._sequence_length = vocabulary, sequence_length
        return bound

    @property
    def columns(self) -> frozenset[str]:
        wanted = {"text": {self.token_ids_field}, "spans": {"spans"}, "sequences": {"token_ids", "modality_ids"}}
        return frozenset(wanted[self.content])

    def inputs(self) -> Iterator[Input]:
        table = _delta_table(self.path) if self.content == "sequences" else None
        if table is None:
            yield from super().inputs()
            return
        folder, committed = table
        # Beside them lie files of attempts that failed and of rows that were replaced.
        for file in find_files(folder, self.name, (".parquet",)):
            if file.uri in committed:
                committed.remove(file.uri)
                size, etag = stamp([file])
                yield Input(uri=file.uri, size=size, etag=etag, parts=(file.part,), divisible=True)
        if committed:
            raise CorpusError(
                f"source {self.name}: {folder}: {len(committed)} committed shards are missing, such as {min(committed)}; "
                "restore the dataset from a copy"
            )

    def spans(self, source: str, record: Record, place: str) -> tuple[RawSpan, ...]:
        if self.content == "text":
            value = value_of(record, self.token_ids_field, "token_ids_field", place)
            ids = self._codes(Modality.TEXT, value, f"{place}, {self.token_ids_field}")
            return (self._encoded(Modality.TEXT, ids, source, place),)
        if self.content == "sequences":
            return tuple(self._sequence_spans(source, record, place))
        listed = enumerate(field(record, "spans", "the record", place, list))
        spans = joined(self._stated_span(source, span, f"{place}, span {index}") for index, span in listed)
        if not spans:
            raise RecordError("document: empty", f"{place}: no span; leave such records out")
        return spans

    @property
    def _known(self) -> Vocabulary:
        assert self._vocabulary is not None, "a source of ids is read as `bound` gives it"
        return self._vocabulary

    def _sequence_spans(self, source: str, record: Record, place: str) -> Iterator[RawSpan]:
        token_ids = _whole_numbers(value_of(record, "token_ids", "the record", place), 2**31, f"{place}, token_ids")
        modality_ids = _whole_numbers(
            value_of(record, "modality_ids", "the record", place), 3, f"{place}, modality_ids"
        )
        try:
            encoded = deinterleave(self._known, token_ids, modality_ids.astype(np.int8))
        except SequenceError as error:
            raise RecordError("tokens: not a document", f"{place}: {error}; correct the record") from error
        for index, span in enumerate(encoded):
            yield self._encoded(span.modality, span.codes, source, f"{place}, span {index}")

    def _stated_span(self, source: str, span: Any, place: str) -> RawSpan:
        modality = _MODALITIES.get(str(span.get("modality"))) if isinstance(span, dict) else None
        if modality is None:
            message = f"{place}: {span!r:.60}; expected an object with modality text, image or audio"
            raise RecordError("tokens: no span", message)
        if modality is Modality.TEXT and span.get("text") is not None:
            return RawSpan(modality=modality, text="".join(texts(span, "text", "the record", place)), uri=source)
        codes = self._codes(modality, value_of(span, "codes", "the record", place), place)
        return self._encoded(modality, codes, source, place)

    def _codes(self, modality: Modality, value: Any, place: str) -> Ids:
        v = self._known
        size = (v.text_pieces, v.image_codebook_size, v.audio_codebook_size)[modality]
        if modality is Modality.TEXT:
            return _whole_numbers(value, size, place)
        if not isinstance(value, list) or not value:
            raise RecordError("tokens: wrong shape", f"{place}: codes are {value!r:.60}; expected a list of rows")
        rows = [_whole_numbers(row, size, f"{place}, row {index}") for index, row in enumerate(value)]
        if uneven := next((index for index, row in enumerate(rows) if len(row) != len(rows[0])), None):
            message = f"{place}, row {uneven}: {len(rows[uneven])} codes, where the first row has {len(rows[0])}"
            raise RecordError("tokens: wrong shape", f"{message}; make all rows equally long")
        return np.stack(rows)

    def _encoded(self, modality: Modality, codes: Ids, source: str, place: str) -> RawSpan:
        if not self.made_with.covers(modality):
            message = f"{place}: {modality.label} codes, but made_with states no {modality.label}_sha256; state it"
            raise RecordError("tokens: unknown tokenizer", message)
        if modality is not Modality.TEXT:
            needed = sequence_length([EncodedSpan(modality=modality, codes=codes)])
            if needed > self._sequence_length:
                message = (
                    f"{place}: a document of this {modality.label} alone has {needed} tokens, over sequence_length"
                )
                raise RecordError("tokens: span too long", f"{message} {self._sequence_length}; raise that or cut it")
        return RawSpan(modality=modality, codes=codes, uri=source)


def _whole_numbers(value: Any, size: int, place: str) -> Ids:
    """A list of ids in 0..size - 1 as int32.

    Raises:
        RecordError: it is something else; the message names the first position that is wrong, and what stands there.
    """
    if not isinstance(value, list | np.ndarray) or not len(value):
        raise RecordError("tokens: wrong shape", f"{place}: {value!r:.60}; expected a list of whole numbers")
    # Of bool, float or None no list of whole numbers is made; larger ones than int64 come as objects.
    if (
        isinstance(value, list)
        and (bad := next((i for i, v in enumerate(value) if type(v) is not int), None)) is not None
    ):
        raise RecordError(
            "tokens: no whole number", f"{place}, position {bad}: {value[bad]!r:.60}; expected a whole number"
        )
    ids = np.asarray(value)
    wrong = np.flatnonzero((ids < 0) | (ids >= size))
    if len(wrong):
        message = f"{place}, position {wrong[0]}: id {value[wrong[0]]} lies outside 0..{size - 1}"
        raise RecordError("tokens: out of range", f"{message}; correct the record or what made_with states")
    return ids.astype(np.int32)


def _delta_table(path: str) -> tuple[str, set[str]] | None:
    """The folder of the Delta table at a path, or of the dataset's there, and the files of its newest version."""
    from pipelines.shards.delta import is_table, open_table
    from pipelines.shards.storage import Storage

    root = Storage.of(path)
    for folder in (root, root.below("shards")):
        # It would not look below a file.
        if (not folder.is_local or Path(folder.root).is_dir()) and is_table(folder):
            return folder.uri, set(open_table(folder).get_add_actions(flatten=True)["path"].to_pylist())
    return None
