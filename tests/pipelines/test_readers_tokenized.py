"""Reader `tokenized`: ids come through unchanged, and never under another tokenizer than they were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.corpus.documents import Document, Reject
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.reader import Reader
from pipelines.corpus.tokenized import TokenizedSource
from pipelines.interleave import EncodedSpan, interleave
from pipelines.recipe import read_recipe
from pipelines.sequence import VocabularyError
from pipelines.shards.dataset import Dataset
from pipelines.shards.digest import dataset_hash
from pipelines.tokenize.job import open_or_create, tokenize
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines.corpora import VOCABULARY, make_dataset, random_row, write_unit
from tests.pipelines.reading import everything, write
from tests.pipelines.test_tokenize import run_units
from tests.pipelines.tiny import tiny_recipe, write_recipe

ALL = {"text_sha256": "t", "image_sha256": "i", "audio_sha256": "a"}


def source(path: Path, content: str, **changes: object) -> TokenizedSource:
    values = {"reader": "tokenized", "name": "ids", "path": str(path), "content": content, "made_with": ALL} | changes
    return TokenizedSource.model_validate(values).bound(VOCABULARY, 128)


def lines(path: Path, *records: dict[str, Any]) -> Path:
    write(path.parent, {path.name: "".join(json.dumps(record) + "\n" for record in records)})
    return path


def read(reader: Reader) -> list[list[EncodedSpan]]:
    """The documents' codes, each of which the vocabulary accepts."""
    documents = []
    for document in everything(reader):
        assert isinstance(document, Document), document
        spans = [EncodedSpan(modality=s.modality, codes=s.codes) for s in document.spans if s.codes is not None]
        interleave(VOCABULARY, spans)
        documents.append(spans)
    return documents


def test_text_ids_are_read_from_lines_and_tables_alike(tmp_path: Path) -> None:
    texts = [[0, 49, 7], [3], list(range(50))]
    lines(tmp_path / "lines" / "x.jsonl", *({"input_ids": ids} for ids in texts))
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"input_ids": pa.array(texts, pa.list_(pa.uint16()))}), tmp_path / "table" / "x.parquet")
    for folder in ("lines", "table"):
        documents = read(source(tmp_path / folder, "text", token_ids_field="input_ids", made_with={"text_sha256": "t"}))
        assert [[span.codes.tolist() for span in spans] for spans in documents] == [[ids] for ids in texts]
        assert {span.codes.dtype for spans in documents for span in spans} == {np.dtype(np.int32)}


SPANS: list[dict[str, Any]] = [
    {"modality": "text", "codes": [1, 2]},
    {"modality": "image", "codes": [[3, 4, 5], [6, 7, 31]]},
    {"modality": "audio", "codes": [[0, 15], [1, 2], [3, 4]]},
]


def test_spans_of_codes_keep_their_shapes(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", {"spans": SPANS})
    kind = pa.struct([("modality", pa.string()), ("codes", pa.list_(pa.list_(pa.int64())))])
    pq.write_table(pa.table({"spans": pa.array([SPANS[1:]], pa.list_(kind))}), tmp_path / "y.parquet")
    both, media = read(source(tmp_path, "spans"))
    assert [(s.modality.label, s.codes.tolist()) for s in both] == [tuple(span.values()) for span in SPANS]
    assert [s.codes.tolist() for s in media] == [span["codes"] for span in SPANS[1:]]


def test_a_caption_may_stand_as_text_beside_codes(tmp_path: Path) -> None:
    caption = {"modality": "text", "text": "a cat"}
    lines(tmp_path / "x.jsonl", {"spans": [caption, SPANS[1], caption | {"codes": None}]})
    (document,) = everything(source(tmp_path, "spans", made_with={"image_sha256": "i"}))
    assert isinstance(document, Document)
    assert [span.text for span in document.spans] == ["a cat", "", "a cat"]
    assert [span.codes is None for span in document.spans] == [True, False, True]


def test_the_committed_shards_of_a_dataset_are_read_and_no_others(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "tokens", units=2, rows=5)
    rng = np.random.default_rng(9)
    orphan = write_unit(dataset, "u9", [random_row("orphan", rng)])
    assert (tmp_path / "tokens/shards" / orphan.name).exists()
    expected = {row["row_id"]: row for batch in dataset.read() for row in batch.to_pylist()}
    reader = source(
        tmp_path / "tokens", "sequences", id_field="row_id", made_with={"fingerprint": VOCABULARY.fingerprint}
    )
    documents = [d for d in everything(reader) if isinstance(d, Document)]
    assert len(documents) == len(expected) == 10
    for document in documents:
        row = expected[document.source.rpartition("#")[2]]
        spans = [EncodedSpan(modality=s.modality, codes=s.codes) for s in document.spans if s.codes is not None]
        assert interleave(VOCABULARY, spans).token_ids.tolist() == row["token_ids"]
    shard = Path(dataset.shards()[0].path)
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=f"1 committed shards are missing, such as {shard.name}"):
        list(reader.inputs())
    shard.with_name("x.parquet").write_bytes((tmp_path / "elsewhere").read_bytes())
    assert len(read(source(shard.with_name("x.parquet"), "sequences"))) == 5, "a shard alone, wherever it lies"


@pytest.mark.parametrize("key", [*ALL, "fingerprint"])
def test_ids_of_other_tokenizers_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=rf"sources: ids: made_with\.{key} is zz, but this recipe's is "):
        source(tmp_path, "spans", made_with=ALL | {key: "zz"})
    reader = source(tmp_path, "spans", made_with=ALL | {"fingerprint": VOCABULARY.fingerprint})
    with pytest.raises(VocabularyError, match=r"made_with\.fingerprint"):
        reader.bound(replace(VOCABULARY, preprocessing={"image": {"version": 2}}), 128)


def test_what_the_ids_were_made_with_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="state what the ids were made with"):
        source(tmp_path, "spans", made_with={})
    for content in ("text", "sequences"):
        with pytest.raises(ValidationError, match="must state text_sha256 or fingerprint"):
            source(tmp_path, content, made_with={"image_sha256": "i"})


def media(codes: Any, modality: str = "image") -> dict[str, Any]:
    return {"spans": [SPANS[0], {"modality": modality, "codes": codes}]}


@pytest.mark.parametrize(
    ("content", "record", "reason", "said"),
    [
        ("text", {"token_ids": [1, 50, 2]}, "tokens: out of range", "token_ids, position 1: id 50 lies outside 0..49"),
        ("text", {"token_ids": [1, -1]}, "tokens: out of range", "position 1: id -1 lies outside"),
        ("text", {"token_ids": [2**80]}, "tokens: out of range", f"position 0: id {2**80} lies outside"),
        ("text", {"token_ids": [1, 2.0]}, "tokens: no whole number", "position 1: 2.0"),
        ("text", {"token_ids": [1, True]}, "tokens: no whole number", "position 1: True"),
        ("text", {"token_ids": [1, None]}, "tokens: no whole number", "position 1: None"),
        ("text", {"token_ids": []}, "tokens: wrong shape", "[]"),
        ("text", {"token_ids": "1 2 3"}, "tokens: wrong shape", "'1 2 3'"),
        ("text", {"tokens": [1]}, "field: missing", "'token_ids'"),
        ("spans", {"spans": []}, "document: empty", "no span"),
        ("spans", {"spans": ["text"]}, "tokens: no span", "span 0: 'text'"),
        ("spans", {"spans": [{"modality": "video", "codes": [1]}]}, "tokens: no span", "span 0"),
        ("spans", {"spans": [{"modality": ["text"], "codes": [1]}]}, "tokens: no span", "span 0"),
        ("spans", media([[1, 2], [3, 32]]), "tokens: out of range", "span 1, row 1, position 1: id 32 lies outside 0..31"),
        ("spans", media([[1, 2], [3]]), "tokens: wrong shape", "span 1, row 1: 1 codes, where the first row has 2"),
        ("spans", media([1, 2]), "tokens: wrong shape", "span 1, row 0: 1"),
        ("spans", media([]), "tokens: wrong shape", "span 1: codes are []"),
        ("spans", media([[0, 16]], "audio"), "tokens: out of range", "span 1, row 0, position 1: id 16"),
        ("spans", media([[1] * 64] * 2), "tokens: span too long", "has 133 tokens, over sequence_length 128"),
        ("sequences", {"token_ids": [50, 1, 51], "modality_ids": [0, 0, 3]}, "tokens: out of range", "position 2"),
        ("sequences", {"token_ids": [50, 1, 51], "modality_ids": [0, 0]}, "tokens: not a document", "must both be [T]"),
        ("sequences", {"token_ids": [50, 1, 1], "modality_ids": [0, 0, 0]}, "tokens: not a document", "stops before"),
        ("sequences", {"token_ids": [50, 1, 200, 51], "modality_ids": [0] * 4}, "tokens: not a document", "position 2"),
        ("sequences", {"token_ids": [50, 1, 51]}, "field: missing", "'modality_ids'"),
    ],
)  # fmt: skip
def test_ids_that_are_none_are_rejected_with_position_and_value(
    content: str, record: dict[str, Any], reason: str, said: str, tmp_path: Path
) -> None:
    good = {
        "token_ids": [50, 1, 51] if content == "sequences" else [1],
        "modality_ids": [0, 0, 0],
        "spans": SPANS,
    }
    file = lines(tmp_path / "x.jsonl", record, good)
    reject, document = everything(source(file, content))
    assert isinstance(document, Document)
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert said in reject.error
    assert f"{file}: line at byte 0" in reject.error


def test_codes_of_a_modality_that_made_with_leaves_out_are_rejected(tmp_path: Path) -> None:
    lines(tmp_path / "x.jsonl", {"spans": SPANS})
    (reject,) = everything(source(tmp_path, "spans", made_with={"text_sha256": "t", "image_sha256": "i"}))
    assert isinstance(reject, Reject)
    assert reject.reason == "tokens: unknown tokenizer"
    assert "span 2: audio codes, but made_with states no audio_sha256" in reject.error


def imported(folder: Path, first: TokenizeRecipe, **made_with: str) -> TokenizeRecipe:
    """A recipe that makes a dataset of another one's tokens."""
    values = {
        "reader": "tokenized",
        "name": "again",
        "path": first.dataset,
        "content": "sequences",
        "id_field": "row_id",
    }
    reader = TokenizedSource.model_validate(values | {"made_with": made_with})
    return first.model_copy(update={"dataset": str(folder / "again"), "sources": [reader]})


def test_a_job_imports_a_dataset_whole(tmp_path: Path) -> None:
    first = tiny_recipe(tmp_path)
    dataset = run_units(first)
    again = run_units(imported(tmp_path, first, fingerprint=dataset.vocabulary.fingerprint))
    assert token_rows(again) == token_rows(dataset)
    assert len(again.quarantined()) == 0
    assert dataset_hash(again) != dataset_hash(dataset), "rows have identities of their own"


def token_rows(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    batches = dataset.read(["token_ids", "modality_ids"])
    return sorted((row["token_ids"], row["modality_ids"]) for batch in batches for row in batch.to_pylist())


def test_a_job_refuses_ids_of_other_tokenizers_before_any_work(tmp_path: Path) -> None:
    recipe = read_recipe(TokenizeRecipe, write_recipe(tmp_path))
    open_or_create(recipe, Tokenizers.load(recipe).vocabulary(recipe))
    with pytest.raises(VocabularyError, match=r"sources: again: made_with\.text_sha256 is other"):
        tokenize(imported(tmp_path, recipe, text_sha256="other"))
    assert not (tmp_path / "again").exists()


def test_what_is_left_for_interleave_goes_to_quarantine(tmp_path: Path) -> None:
    """The number of codebooks is no part of a checkpoint's sha256."""
    recipe = read_recipe(TokenizeRecipe, write_recipe(tmp_path))
    vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
    bad = {"spans": [{"modality": "audio", "codes": [[1, 2, 3]]}]}
    text = {"modality": "text", "codes": [1]}
    lines(tmp_path / "ids.jsonl", bad, {"spans": [text, text]}, {"spans": [text]})
    values = {"reader": "tokenized", "name": "ids", "path": str(tmp_path / "ids.jsonl"), "content": "spans"}
    made_with = {"text_sha256": vocabulary.text_sha256, "audio_sha256": vocabulary.audio_sha256}
    reader = TokenizedSource.model_validate(values | {"made_with": made_with})
    update = {"sources": [reader], "error_budget": 1.0}
    dataset = run_units(recipe.model_copy(update=update))
    errors = {row["source"].rpartition("#")[2]: row["error"] for row in dataset.quarantined()}
    assert dataset.statistics().documents == 1
    assert "span 0 (audio): 3 codebooks, but the vocabulary has 2" in errors["0"]
    assert "span 1 (text): follows another text span" in errors[str(len(json.dumps(bad)) + 1)]
