"""Readers: every document exactly once, and what cannot be read is named."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipelines.corpus import Source
from pipelines.corpus.documents import Document, Input, Reject
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.files import files_below
from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.sequence import Modality
from tests.pipelines.reading import everything, only_reject, whole, write

PICTURE, SOUND = random.Random(1).randbytes(300), random.Random(2).randbytes(500)


def folder_source(root: Path, **changes: object) -> MediaFolderSource:
    return MediaFolderSource.model_validate({"reader": "media_folder", "name": "s", "path": str(root)} | changes)


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
