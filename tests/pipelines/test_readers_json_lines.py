"""Reader `jsonl`: every line exactly once however a file is divided or compressed, and what cannot be read is named."""

from __future__ import annotations

import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.documents import Document, Reject, Slice
from pipelines.corpus.errors import CorpusError, RecordError
from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.record_files import lines
from tests.pipelines.reading import everything, only_reject, whole, write


def lines_source(path: Path | str, **changes: object) -> JsonLinesSource:
    return JsonLinesSource.model_validate({"reader": "jsonl", "name": "t", "path": str(path)} | changes)


LINE = st.one_of(
    st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")),
    st.text(max_size=8).map(lambda t: json.dumps({"text": t}).encode()),
)


@settings(deadline=None)
@given(content=st.lists(LINE, max_size=12), last_newline=st.booleans(), data=st.data())
def test_any_division_of_a_file_gives_every_line_once_in_order(
    content: list[bytes], last_newline: bool, data: st.DataObject
) -> None:
    raw = b"\n".join(content) + b"\n" * last_newline
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=5).map(sorted))
    limit = data.draw(st.sampled_from([1, 5, 1000]))
    borders = [0, *cuts, len(raw)]
    pieces = itertools.pairwise(borders)
    got = [
        (offset, line.reason if isinstance(line, RecordError) else line)
        for start, stop in pieces
        for offset, line in lines(io.BytesIO(raw), start, stop, limit)
    ]
    expected, offset = [], 0
    for line in io.BytesIO(raw).readlines():
        expected.append((offset, line if len(line.removesuffix(b"\n")) <= limit else "line: too long"))
        offset += len(line)
    assert got == expected


def test_slices_of_a_source_together_give_the_whole(tmp_path: Path) -> None:
    rng = random.Random(5)
    records = [{"text": "x" * rng.randint(1, 90), "n": i} for i in range(200)]
    write(tmp_path, {"a/one.jsonl": "\r\n".join(map(json.dumps, records)), "two.jsonl": '{"text": "é"}\n\n'})
    source = lines_source(tmp_path)
    one, two = source.inputs()
    assert (one.uri, two.uri, one.divisible) == ("a/one.jsonl", "two.jsonl", True)
    expected = everything(source)
    assert len(expected) == 201
    pieces = [Slice(input=one, start=s, stop=min(s + 97, one.size)) for s in range(0, one.size, 97)]
    assert list(source.read([*pieces, *whole([two])])) == expected
    assert len({d.row_id for d in expected if isinstance(d, Document)}) == 201


def test_a_record_is_named_by_its_id_or_by_its_offset(tmp_path: Path) -> None:
    write(tmp_path, {"x.jsonl": '{"id": "one", "text": "1"}\n{"id": 2, "text": " deux "}\n'})
    by_id = everything(lines_source(tmp_path / "x.jsonl", id_field="id"))
    assert [d.source for d in by_id] == ["t/x.jsonl#one", "t/x.jsonl#2"]
    by_offset = everything(lines_source(tmp_path / "x.jsonl"))
    assert [d.source for d in by_offset] == ["t/x.jsonl#0", "t/x.jsonl#27"]
    assert isinstance(by_id[1], Document)
    (span,) = by_id[1].spans
    assert (span.text, span.uri) == (" deux ", "t/x.jsonl")


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (b"{'text': 1}", "json: not valid", "write one object"),
        (b"[" * 100_000, "json: not valid", "not JSON"),
        (b'["text"]', "json: no object", "list"),
        (b'{"txet": "x"}', "field: missing", "it has: txet"),
        (b'{"text": null}', "field: wrong type", "NoneType, expected str"),
        (b'{"text": 1}', "field: wrong type", "int"),
        (b'{"text": "caf\xe9"}', "text: not UTF-8", "not UTF-8 at byte 13"),
        ('{"text": "x"}'.encode("utf-16"), "text: not UTF-8", "not UTF-8 at byte 0"),
        (b'{"text": " \\n"}', "text: empty", "no text"),
        (b'{"text": "\\ud800"}', "text: not Unicode", "surrogate"),
        (b'{"text": "%s"}' % (b"x" * 200_000), "line: too long", "max_line_mb"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place_and_the_rest_goes_on(
    line: bytes, reason: str, said: str, tmp_path: Path
) -> None:
    write(tmp_path, {"x.jsonl": b'\xef\xbb\xbf{"text": "first"}\n' + line + b'\n{"text": "last"}'})
    before, reject, *after = everything(lines_source(tmp_path, max_line_mb=0.15))
    assert isinstance(before, Document)
    assert isinstance(reject, Reject)
    assert (reject.source, reject.reason) == ("t/x.jsonl#21", reason)
    assert said in reject.error
    assert f"{tmp_path}/x.jsonl: line at byte 21: " in reject.error
    assert isinstance(after[-1], Document)
    assert after[-1].spans[0].text == "last"


@pytest.mark.parametrize("value", ["true", "1.5", "null"])
def test_an_id_is_text_or_a_whole_number(value: str, tmp_path: Path) -> None:
    write(tmp_path, {"x.jsonl": f'{{"text": "x", "id": {value}}}'})
    assert only_reject(lines_source(tmp_path, id_field="id")).reason == "field: wrong type"


def test_a_glob_names_files_below_its_fixed_part(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("2025/a.jsonl", "2026/a.jsonl", "2026/b/c.json", "x.jsonl"), '{"text": "x"}'))
    uris = [item.uri for item in lines_source(f"{tmp_path}/20*/**/*.json*").inputs()]
    assert uris == ["2025/a.jsonl", "2026/a.jsonl", "2026/b/c.json"]


def test_a_folder_without_lines_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"notes.md": "x"})
    with pytest.raises(CorpusError, match=r"no file that matches .* ends in \.jsonl"):
        list(lines_source(tmp_path).inputs())


def test_a_lines_file_that_vanishes_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"x.jsonl": '{"text": "x"}'})
    source = lines_source(tmp_path)
    slices = whole(source.inputs())
    (tmp_path / "x.jsonl").unlink()
    (reject,) = source.read(slices)
    assert isinstance(reject, Reject)
    assert reject.reason == "file: unreadable"


def test_reading_holds_one_line_not_the_file(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.seek(400_000_000)
        file.write(b'"}\n{"text": "last"}\n')
    code = (
        "import sys; from tests.peak import peak_kb;"
        "from tests.pipelines.test_readers_json_lines import everything, lines_source;"
        "before = peak_kb();"
        "results = everything(lines_source(sys.argv[1], max_line_mb=5));"
        "after = peak_kb();"
        "print(len(results), after - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 2
    assert kilobytes < 40_000
