"""Readers: every document exactly once, and what cannot be read is named."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipelines.corpus import Source
from pipelines.corpus.documents import Document, Input, Reject, Slice
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.files import files_below
from pipelines.corpus.json_lines import JsonLinesSource, lines
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.corpus.reader import Reader
from pipelines.sequence import Modality

PICTURE, SOUND = random.Random(1).randbytes(300), random.Random(2).randbytes(500)


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


def folder_source(root: Path, **changes: object) -> MediaFolderSource:
    return MediaFolderSource.model_validate({"reader": "media_folder", "name": "s", "path": str(root)} | changes)


def lines_source(path: Path | str, **changes: object) -> JsonLinesSource:
    return JsonLinesSource.model_validate({"reader": "jsonl", "name": "t", "path": str(path)} | changes)


def only_reject(source: Reader) -> Reject:
    (reject,) = everything(source)
    assert isinstance(reject, Reject)
    return reject


# Media folder


def test_files_of_one_stem_are_one_document(tmp_path: Path) -> None:
    write(tmp_path, {"a/apple.png": PICTURE, "a/apple.txt": " Une pomme.\n", "a/apple.ogg": SOUND, "a/pear.JPG": b"p"})
    source = folder_source(tmp_path, templates=["{text}{image}{audio}"])
    apple, pear = everything(source)
    assert isinstance(apple, Document)
    assert isinstance(pear, Document)
    assert (apple.source, apple.position, pear.source) == ("s/a/apple", 0, "s/a/pear")
    assert [(s.modality, s.text, s.data, s.uri) for s in apple.spans] == [
        (Modality.TEXT, "Une pomme.", b"", "s/a/apple.txt"),
        (Modality.IMAGE, "", PICTURE, "s/a/apple.png"),
        (Modality.AUDIO, "", SOUND, "s/a/apple.ogg"),
    ]
    assert [s.uri for s in pear.spans] == ["s/a/pear.JPG"]


def test_several_media_of_one_stem_follow_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"x.webp": b"1", "x.gif": b"2", "x.wav": b"3", "x.mp3": b"4", "x.y.png": b"5"})
    first, second = everything(folder_source(tmp_path))
    assert isinstance(first, Document)
    assert [s.uri for s in first.spans] == ["s/x.gif", "s/x.webp", "s/x.mp3", "s/x.wav"]
    assert second.source == "s/x.y"


@settings(max_examples=30, deadline=None)
@given(names=st.sets(st.from_regex(r"\A[ab-]{1,2}(/[ab.! -]{0,1}[ab]){0,2}\.(png|txt|ogg)\Z"), min_size=1, max_size=12))
def test_inputs_are_sorted_by_uri_and_miss_nothing(names: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    names |= {"b/shown.png"}
    root = write(tmp_path_factory.mktemp("corpus"), dict.fromkeys(names, "x"))
    inputs = list(folder_source(root).inputs())
    uris = [item.uri for item in inputs]
    visible = {name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    assert uris == sorted(uris)
    assert {str(Path(part).relative_to(root)) for item in inputs for part in item.parts} == visible
    assert len(set(uris)) == len(uris)


def test_each_document_draws_a_template_by_its_row_id(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.{ending}": f"{i}" for i in range(60) for ending in ("png", "txt")})
    source = folder_source(tmp_path)
    documents = {d.source: d for d in everything(source) if isinstance(d, Document)}
    captions_first = {name for name, d in documents.items() if d.spans[0].modality is Modality.TEXT}
    assert 15 < len(captions_first) < 45
    backwards = list(source.read(whole(source.inputs())[::-1]))
    assert {d.source: d for d in backwards} == documents
    other = folder_source(tmp_path, seed=1)
    assert any(d != documents[d.source] for d in everything(other))


def test_a_template_leaves_out_what_it_does_not_name(tmp_path: Path) -> None:
    write(tmp_path, {"x.png": PICTURE, "x.txt": "word"})
    (document,) = everything(folder_source(tmp_path, templates=["{image}"]))
    assert isinstance(document, Document)
    assert [s.modality for s in document.spans] == [Modality.IMAGE]
    reject = only_reject(folder_source(tmp_path, templates=["{audio}"]))
    assert reject.reason == "document: empty"
    assert "s/x: nothing in it for the template '{audio}'" in reject.error


def test_text_of_a_template_stands_where_the_document_has_all_that_it_names(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PICTURE, "a.txt": "a cat", "b.png": PICTURE})
    both, bare = everything(folder_source(tmp_path, templates=["Look: {image}\nThis is {text} {{}}."]))
    assert isinstance(both, Document)
    assert isinstance(bare, Document)
    assert [s.text for s in both.spans] == ["Look: ", "", "\nThis is a cat {}."]
    assert [s.modality for s in bare.spans] == [Modality.IMAGE]


@pytest.mark.parametrize(
    "templates", [[], [""], ["{text}{text}"], ["{picture}"], ["{text"], ["{text!r}"], ["{}"], ["{language}: a flag"]]
)
def test_impossible_templates_are_refused(templates: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="template"):
        folder_source(tmp_path, templates=templates)


def test_a_glob_takes_a_part_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("a/1.txt", "a/b/2.txt", "c/3.txt", "a/4.png", ".git/5.txt", ".6.txt"), "x"))

    def uris(glob: str) -> list[str]:
        return [file.uri for file in files_below(tmp_path, glob)]

    assert uris("**") == ["a/1.txt", "a/4.png", "a/b/2.txt", "c/3.txt"]
    assert uris("a/**") == ["a/1.txt", "a/4.png", "a/b/2.txt"]
    assert uris("a/*") == ["a/1.txt", "a/4.png"]
    assert uris("**/*.txt") == ["a/1.txt", "a/b/2.txt", "c/3.txt"]
    assert uris("[bc]/?.txt") == ["c/3.txt"]
    with pytest.raises(CorpusError, match="cannot be listed"):
        uris("absent/*.txt")


def test_the_etag_changes_with_any_part(tmp_path: Path) -> None:
    write(tmp_path, {"x.png": PICTURE, "x.txt": "word"})

    def state() -> Input:
        (item,) = folder_source(tmp_path).inputs()
        return item

    first = state()
    assert first == state()
    assert first.size == 304
    seen = {first.etag}
    for change in (
        lambda: (tmp_path / "x.txt").write_text("words"),
        lambda: os.utime(tmp_path / "x.png", ns=(1, 1)),
        lambda: (tmp_path / "x.png").rename(tmp_path / "x.gif"),
        lambda: (tmp_path / "x.txt").unlink(),
    ):
        change()
        seen.add(state().etag)
    assert len(seen) == 5


def test_a_caption_that_is_not_utf8_is_rejected_with_its_offset(tmp_path: Path) -> None:
    write(tmp_path, {"x.txt": b"caf\xe9", "x.png": PICTURE})
    reject = only_reject(folder_source(tmp_path))
    assert (reject.source, reject.reason) == ("s/x", "text: not UTF-8")
    assert f"{tmp_path}/x.txt: not UTF-8 at byte 3" in reject.error


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"x.txt": "\ufeffword"})
    (document,) = everything(folder_source(tmp_path))
    assert isinstance(document, Document)
    assert document.spans[0].text == "word"


def test_files_that_cannot_be_read_are_rejected_and_the_rest_goes_on(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PICTURE, "big.png": PICTURE * 10, "c.txt": " \n", "d.txt": "text"})
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b2.png").symlink_to(tmp_path / "b2.png")
    results = everything(folder_source(tmp_path, max_file_mb=0.001))
    assert [r.reason if isinstance(r, Reject) else "read" for r in results] == [
        "read",
        "file: unreadable",
        "file: unreadable",
        "file: too large",
        "document: empty",
        "read",
    ]


def test_a_file_that_vanishes_after_the_listing_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"x.png": PICTURE})
    source = folder_source(tmp_path)
    slices = whole(source.inputs())
    (tmp_path / "x.png").unlink()
    (reject,) = source.read(slices)
    assert isinstance(reject, Reject)
    assert "No such file" in reject.error


def test_names_that_are_not_utf8_are_read_and_written_as_unicode(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 100%.txt")).write_text("word")
    source = folder_source(tmp_path)
    (item,) = source.inputs()
    assert item.uri == r"caf\xe9 100%"
    "".join(item.parts).encode()
    (document,) = everything(source)
    assert isinstance(document, Document)
    assert document.spans[0].text == "word"


def test_links_are_followed_and_loops_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"real/x.txt": "word", "corpus/y.txt": "word"})
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "real")
    assert [item.uri for item in folder_source(tmp_path / "corpus").inputs()] == ["linked/x", "y"]
    (tmp_path / "corpus/up").symlink_to(tmp_path / "corpus")
    with pytest.raises(CorpusError, match="leads back"):
        list(folder_source(tmp_path / "corpus").inputs())


def test_pipes_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"x.txt": "word"})
    os.mkfifo(tmp_path / "pipe.png")
    assert [item.uri for item in folder_source(tmp_path).inputs()] == ["x"]


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"absent does not exist; set its `path`"):
        list(folder_source(tmp_path / "absent").inputs())
    write(tmp_path, {"notes.md": "x", "table.csv": "x"})
    with pytest.raises(CorpusError, match="nothing to read"):
        list(folder_source(tmp_path).inputs())
    with pytest.raises(CorpusError, match=r"notes\.md is no folder"):
        list(folder_source(tmp_path / "notes.md").inputs())
    with pytest.raises(CorpusError, match=r"no file that matches .* ends in \.jsonl"):
        list(lines_source(tmp_path).inputs())


# JSON lines


LINE = st.one_of(
    st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"")),
    st.text(max_size=8).map(lambda t: json.dumps({"text": t}).encode()),
)


@given(content=st.lists(LINE, max_size=12), last_newline=st.booleans(), data=st.data())
def test_any_division_of_a_file_gives_every_line_once_in_order(
    content: list[bytes], last_newline: bool, data: st.DataObject
) -> None:
    raw = b"\n".join(content) + b"\n" * last_newline
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=5).map(sorted))
    limit = data.draw(st.sampled_from([1, 5, 1000]))
    borders = [0, *cuts, len(raw)]
    pieces = itertools.pairwise(borders)
    got = [item for start, stop in pieces for item in lines(io.BytesIO(raw), start, stop, limit)]
    expected, offset = [], 0
    for line in io.BytesIO(raw).readlines():
        expected.append((offset, line if len(line.removesuffix(b"\n")) <= limit else None))
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
        (b"{'text': 1}", "json: not valid", "write one object a line"),
        (b"[" * 100_000, "json: not valid", "not JSON"),
        (b'["text"]', "json: no object", "list"),
        (b'{"txet": "x"}', "json: field missing", "it has: txet"),
        (b'{"text": null}', "json: wrong type", "NoneType, expected str"),
        (b'{"text": 1}', "json: wrong type", "int"),
        (b'{"text": "caf\xe9"}', "text: not UTF-8", "at its byte 13"),
        ('{"text": "x"}'.encode("utf-16"), "text: not UTF-8", "at its byte 0"),
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
    assert only_reject(lines_source(tmp_path, id_field="id")).reason == "json: wrong type"


def test_a_glob_names_files_below_its_fixed_part(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("2025/a.jsonl", "2026/a.jsonl", "2026/b/c.json", "x.jsonl"), '{"text": "x"}'))
    uris = [item.uri for item in lines_source(f"{tmp_path}/20*/**/*.json*").inputs()]
    assert uris == ["2025/a.jsonl", "2026/a.jsonl", "2026/b/c.json"]


def test_compressed_lines_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": "{}", "b.jsonl.gz": b"\x1f\x8b"})
    with pytest.raises(CorpusError, match=r"b\.jsonl\.gz is compressed"):
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
        "import resource, sys; from tests.pipelines.test_corpus import everything, lines_source;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "results = everything(lines_source(sys.argv[1], max_line_mb=5));"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(len(results), after - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 2
    assert kilobytes < 40_000


# Recipes


def test_a_recipe_names_its_readers() -> None:
    adapter: TypeAdapter[Source] = TypeAdapter(Source)  # type: ignore[valid-type]
    source = adapter.validate_python({"reader": "jsonl", "name": "text", "path": "x"})
    assert isinstance(source, JsonLinesSource)
    with pytest.raises(ValidationError, match="media_folder"):
        adapter.validate_python({"reader": "folder", "name": "text", "path": "x"})
    with pytest.raises(ValidationError, match="name"):
        adapter.validate_python({"reader": "jsonl", "name": "a/b", "path": "x"})


def test_decoding_media_needs_no_pydantic() -> None:
    code = "import sys, pipelines.corpus.pictures; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
