"""Parquet of captioned media: every row exactly once, read in small batches, and what cannot be read is named."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.corpus.documents import Document, Reject, Slice
from pipelines.corpus.parquet import ParquetSource
from pipelines.sequence import Modality
from tests.pipelines import media_samples
from tests.pipelines.media_samples import caption, picture, sound
from tests.pipelines.reading import everything, only_reject, whole, write


def table_source(path: Path | str, **changes: Any) -> ParquetSource:
    settings = {"reader": "parquet", "name": "p", "path": str(path), "templates": ["{text}{image}{audio}"]}
    return ParquetSource.model_validate(settings | changes)


def write_table(file: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), file, write_page_checksum=True, **settings)
    return file


def contents(results: list[Document | Reject]) -> list[list[str | bytes]]:
    assert all(isinstance(item, Document) for item in results), results
    return [[span.text or span.data for span in item.spans] for item in results if isinstance(item, Document)]


def test_the_librarys_own_table_is_read(tmp_path: Path) -> None:
    fields = media_samples.parquet(tmp_path)
    assert "huggingface" in str(pq.read_schema(tmp_path / "train-00000-of-00001.parquet").metadata)
    source = table_source(**fields | {"reader": "parquet", "language_field": "meta.language"})
    (item,) = source.inputs()
    assert (item.uri, item.divisible) == ("train-00000-of-00001.parquet", True)
    documents = everything(source)
    assert [item.source for item in documents] == [f"p/{item.uri}#row{i}" for i in range(media_samples.COUNT)]
    first = documents[0]
    assert isinstance(first, Document)
    assert first.language == "en"
    record = f"p/{item.uri}#row0"
    assert [(s.modality, s.text, s.data, s.uri) for s in first.spans] == [
        (Modality.TEXT, caption(0), b"", record),
        (Modality.IMAGE, "", picture(0), f"{record}/0.png"),
        (Modality.AUDIO, "", sound(0), record),
    ]


@pytest.mark.parametrize("rule", ["first", "all", "one"])
def test_of_several_captions_the_recipe_chooses(rule: str, tmp_path: Path) -> None:
    captions = [[f"a{i}", f"b{i}", f"c{i}"] for i in range(60)]
    write_table(tmp_path / "x.parquet", {"captions": captions})
    source = table_source(tmp_path, text_field="captions", captions=rule)
    found = ["".join(map(str, spans)) for spans in contents(everything(source))]
    if rule == "first":
        assert found == [a for a, _, _ in captions]
    elif rule == "all":
        assert found == ["\n".join(several) for several in captions]
    else:
        assert all(text in several for text, several in zip(found, captions, strict=True))
        assert {text[0] for text in found} == {"a", "b", "c"}
        assert found == ["".join(map(str, spans)) for spans in contents(everything(source))]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([b"one", None, b"three"], pa.binary()),
        pa.array([b"one", None, b"three"], pa.large_binary()),
        pa.array([{"bytes": b"one", "path": "x.png"}, None, {"bytes": b"three", "path": None}]),
        pa.array([{"bytes": b"one"}, {"bytes": None}, {"bytes": b"three"}]),
        pa.array(
            [{"bytes": None, "path": "in/1.png"}, {"bytes": None, "path": None}, {"bytes": b"three", "path": None}]
        ),
        pa.array(["in/1.png", None, "in/3.png"]),
        pa.array([[b"one"], [], [b"th", b"ree"]]),
        pa.array([["in/1.png"], None, ["in/3.png"]]),
    ],
    ids=lambda cells: str(cells.type),
)
def test_pictures_lie_in_the_table_or_below_a_folder(cells: pa.Array, tmp_path: Path) -> None:
    write(tmp_path / "media", {"in/1.png": b"one", "in/3.png": b"three"})
    write_table(tmp_path / "x.parquet", {"text": ["a", "b", "c"], "image": cells})
    source = table_source(tmp_path, text_field="text", image_field="image", media=str(tmp_path / "media"))
    found = [
        (spans[0], b"".join(s for s in spans[1:] if isinstance(s, bytes))) for spans in contents(everything(source))
    ]
    assert found == [("a", b"one"), ("b", b""), ("c", b"three")]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    group=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 10**6), max_size=5),
    dictionary=st.booleans(),
)
def test_any_division_of_a_table_gives_every_row_once_in_order(
    rows: int, group: int, cuts: list[int], dictionary: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = {
        "unused": pa.array(range(rows), pa.int64()),
        "text": pa.array([f"row {i}" for i in range(rows)], pa.string()),
    }
    folder = tmp_path_factory.mktemp("table")
    write_table(folder / "x.parquet", columns, row_group_size=group, use_dictionary=dictionary)
    source = table_source(folder, text_field="text")
    (item,) = source.inputs()
    borders = [0, *sorted(cut % item.size for cut in cuts), item.size]
    slices = [Slice(input=item, start=start, stop=stop) for start, stop in itertools.pairwise(borders)]
    results = [document for piece in slices for document in source.read([piece])]
    assert contents(results) == [[f"row {i}"] for i in range(rows)]
    assert [item.source for item in results] == [f"p/x.parquet#{i}" for i in range(rows)]


def test_columns_that_nobody_names_are_not_read(tmp_path: Path) -> None:
    rows = 200
    columns = {"text": [f"row {i}" for i in range(rows)], "video": [b"v" * 20_000] * rows, "a.b": ["dotted"] * rows}
    file = write_table(tmp_path / "x.parquet", columns, compression="none", use_dictionary=False)
    damaged = bytearray(file.read_bytes())
    where = damaged.find(b"vvvv")
    damaged[where + 50 : where + 90] = bytes(40)
    file.write_bytes(damaged)
    assert len(contents(everything(table_source(tmp_path, text_field="text")))) == rows
    assert contents(everything(table_source(tmp_path, text_field="a.b")))[0] == ["dotted"]


def test_a_damaged_page_costs_the_rest_of_its_row_group(tmp_path: Path) -> None:
    texts = [f"text number {i:03}" for i in range(30)]
    file = write_table(
        tmp_path / "x.parquet", {"t": texts}, row_group_size=10, compression="none", use_dictionary=False
    )
    raw = bytearray(file.read_bytes())
    raw[raw.find(b"number 015")] ^= 1
    file.write_bytes(raw)
    results = everything(table_source(tmp_path, text_field="t"))
    (reject,) = (item for item in results if isinstance(item, Reject))
    assert reject.reason == "parquet: damaged"
    assert "row group 1" in reject.error
    kept = [item for item in results if isinstance(item, Document)]
    assert contents(list(kept)) == [[text] for text in texts[:10] + texts[20:]]


@pytest.mark.parametrize("field", ["caption", "meta.caption", "text.caption"])
def test_a_column_that_is_not_there_is_named_once_a_slice(field: str, tmp_path: Path) -> None:
    write_table(tmp_path / "x.parquet", {"text": ["a", "b"], "meta": [{"id": 1}, {"id": 2}]})
    reject = only_reject(table_source(tmp_path, text_field=field))
    assert reject.reason == "field: missing"
    assert f"x.parquet: no field '{field}' (it has: text, meta); correct text_field" in reject.error


@pytest.mark.parametrize(
    ("cell", "settings", "reason", "said"),
    [
        ({"text": 5}, {"text_field": "text"}, "field: wrong type", "holds a int, expected text"),
        ({"image": 5}, {"image_field": "image"}, "field: wrong type", "a int, expected bytes, a path, or a struct"),
        ({"image": "a.png"}, {"image_field": "image"}, "media: not in the table", "set `media`"),
        ({"image": "../a.png"}, {"image_field": "image", "media": "."}, "file: unsafe name", "'../a.png'"),
        ({"image": "/etc/passwd"}, {"image_field": "image", "media": "."}, "file: unsafe name", "'/etc/passwd'"),
        ({"image": "absent.png"}, {"image_field": "image", "media": "."}, "file: unreadable", "No such file"),
        ({"image": b"x" * 2000}, {"image_field": "image"}, "file: too large", "max_file_mb = 0.001"),
        ({"text": " "}, {"text_field": "text"}, "document: empty", "nothing in it"),
        ({"text": "x", "id": 0.5}, {"text_field": "text", "id_field": "id"}, "field: wrong type", "id 0.5"),
    ],
)
def test_a_bad_row_is_rejected_with_its_place(
    cell: dict[str, Any], settings: dict[str, str], reason: str, said: str, tmp_path: Path
) -> None:
    write_table(tmp_path / "x.parquet", {name: [value] for name, value in cell.items()})
    reject = only_reject(table_source(tmp_path, **settings, max_file_mb=0.001))
    assert (reject.source, reject.reason) == ("p/x.parquet#0", reason)
    assert said in reject.error


def test_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"caf\xe9", b"fine"]).view(pa.string())
    write_table(tmp_path / "x.parquet", {"text": bad})
    first, reject, last = everything(table_source(tmp_path, text_field="text"))
    assert contents([first, last]) == [["good"], ["fine"]]
    assert isinstance(reject, Reject)
    assert reject.reason == "text: not UTF-8"


def test_what_is_no_table_is_rejected_once(tmp_path: Path) -> None:
    file = write_table(tmp_path / "x.parquet", {"text": ["a", "b"]})
    for content in (b"", b"PAR1", file.read_bytes()[:-9], b"x" * 3000):
        file.write_bytes(content)
        source = table_source(tmp_path, text_field="text")
        (item,) = source.inputs()
        half = item.size // 2
        slices = [Slice(input=item, start=0, stop=half), Slice(input=item, start=half, stop=item.size)]
        (reject,) = source.read(slices if half else whole([item]))
        assert isinstance(reject, Reject)
        assert reject.reason == "parquet: damaged"


def test_a_source_must_name_a_field() -> None:
    with pytest.raises(ValidationError, match="name at least one of text_field, image_field and audio_field"):
        table_source("x")


def test_memory_holds_a_batch_not_the_row_group(tmp_path: Path) -> None:
    cells = pa.array([bytes([i % 251]) * 300_000 for i in range(1200)])
    # By default the library puts a thousand rows into a page, and a page is held whole.
    write_table(tmp_path / "x.parquet", {"image": cells}, compression="none", use_dictionary=False, write_batch_size=8)
    del cells
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 1
    code = (
        "import sys; from tests.peak import peak_kb; from pipelines.corpus.documents import Slice;"
        "from pipelines.corpus.parquet import ParquetSource;"
        "source = ParquetSource(reader='parquet', name='p', path=sys.argv[1], image_field='image');"
        "(item,) = source.inputs();"
        "before = peak_kb();"
        "count = sum(1 for _ in source.read([Slice(input=item, start=0, stop=item.size)]));"
        "print(count, peak_kb() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 1200
    # Of 360 MB.
    assert kilobytes < 100_000, kilobytes
