"""LibriSpeech, Common Voice, COCO and folders with captions in JSON: every document once, and what is missing is named."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipelines.corpus.documents import Document, Dropped, Reject, Slice
from pipelines.corpus.errors import CorpusError, RecordError
from pipelines.corpus.json_arrays import array_items
from pipelines.corpus.reader import Reader
from pipelines.corpus.side_files import below
from pipelines.corpus.sources import Source
from pipelines.sequence import Modality
from tests.pipelines import media_samples
from tests.pipelines.media_samples import COUNT, caption, picture, sound
from tests.pipelines.reading import everything, only_reject, write

READERS: TypeAdapter[Reader] = TypeAdapter(Source)


def source_of(settings: dict[str, Any], **changes: Any) -> Reader:
    return READERS.validate_python({"name": "s", "templates": ["{text}{image}{audio}"]} | settings | changes)


def contents(results: list[Document | Reject]) -> dict[str, list[str | bytes]]:
    """Of documents: what their spans hold, by the record's name."""
    assert all(isinstance(item, Document) for item in results), results
    found = {item.source.partition("#")[2]: item for item in results if isinstance(item, Document)}
    return {name: [span.text or span.data for span in item.spans] for name, item in found.items()}


@pytest.mark.parametrize("write_sample", [media_samples.common_voice, media_samples.coco])
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=6))
def test_any_division_of_a_table_gives_every_document_once_in_order(
    write_sample: Callable[[Path], dict[str, Any]], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = source_of(write_sample(tmp_path_factory.mktemp("sample")))
    results = []
    for item in source.inputs():
        assert item.divisible
        borders = [0, *sorted(cut % item.size for cut in cuts), item.size]
        for start, stop in itertools.pairwise(borders):
            results += source.read([Slice(input=item, start=start, stop=stop)])
    assert results == everything(source)
    assert len({item.row_id for item in results if isinstance(item, Document)}) == COUNT


# LibriSpeech


def test_an_utterance_is_one_document_and_a_chapter_one_input(tmp_path: Path) -> None:
    source = source_of(media_samples.librispeech(tmp_path))
    chapters = list(source.inputs())
    assert [item.uri for item in chapters] == [f"LibriSpeech/dev-clean/84/{n}" for n in (121123, 121550)]
    assert [len(item.parts) for item in chapters] == [4, 4]
    first = everything(source)[0]
    assert isinstance(first, Document)
    record = "s/LibriSpeech/dev-clean/84/121123#84-121123-0000"
    assert (first.source, first.language) == (record, "en")
    assert [(s.modality, s.text, s.data, s.uri) for s in first.spans] == [
        (Modality.TEXT, "THE FOX NUMBER 0", b"", record),
        (Modality.AUDIO, "", sound(0, "FLAC"), f"{record}.flac"),
    ]
    quiet = everything(source_of(media_samples.librispeech(tmp_path / "again"), lower_case=True, language="en-US"))[0]
    assert isinstance(quiet, Document)
    assert (quiet.language, quiet.spans[0].text) == ("en-US", "the fox number 0")


def test_a_chapter_may_be_the_folder_itself_or_hold_others(tmp_path: Path) -> None:
    write(tmp_path, {"1-2.trans.txt": "1-2-0 A\n1-2-1 B\n", "1-2-0.flac": b"a", "1-2-1.flac": b"b"})
    write(tmp_path, {"1-2-0a/3-4-0.flac": b"c", "1-2-0a/3-4.trans.txt": "3-4-0 C"})
    source = source_of({"reader": "librispeech", "path": str(tmp_path)})
    assert [item.uri for item in source.inputs()] == [".", "1-2-0a"]
    assert contents(everything(source)) == {"1-2-0": ["A", b"a"], "1-2-1": ["B", b"b"], "3-4-0": ["C", b"c"]}


def test_what_lacks_its_recording_or_transcript_is_rejected(tmp_path: Path) -> None:
    lines = "1-2-0 WHOLE\n1-2-1 NO RECORDING\n1-2-3\n"
    write(tmp_path, {"1-2.trans.txt": lines, "1-2-0.flac": b"a", "1-2-2.flac": b"no transcript", "1-2-3.flac": b"d"})
    whole, *rejects = everything(source_of({"reader": "librispeech", "path": str(tmp_path)}))
    assert isinstance(whole, Document)
    assert [(r.source, r.reason) for r in rejects if isinstance(r, Reject)] == [
        ("s/.#1-2-1", "recording: missing"),
        ("s/.#1-2-2", "transcript: missing"),
        ("s/.#1-2-3", "transcript: missing"),
    ]


def test_an_utterance_that_comes_twice_is_not_lost_in_silence(tmp_path: Path) -> None:
    lines = "1-2-0 ONE\n1-2-1 ONE\n1-2-1 ANOTHER\n1-2-2 TWO\n"
    files = {"1-2-0.flac": b"a", "1-2-0.wav": b"other", "1-2-1.flac": b"b", "1-2-2.flac": b"c"}
    write(tmp_path, {"1-2.trans.txt": lines, "more.trans.txt": "1-2-2 TWO\n", **files})
    results = everything(source_of({"reader": "librispeech", "path": str(tmp_path)}))
    assert [(r.source, r.reason, isinstance(r, Reject)) for r in results if isinstance(r, Reject)] == [
        ("s/.#1-2-0", "recording: twice", True),
        ("s/.#1-2-1", "transcript: twice", True),
    ]
    # The same words twice are no contradiction.
    assert contents([r for r in results if isinstance(r, Document)]) == {"1-2-2": ["TWO", b"c"]}


def test_a_transcript_file_that_is_not_utf8_costs_its_chapter(tmp_path: Path) -> None:
    write(tmp_path, {"a/1-2.trans.txt": b"1-2-0 CAF\xc9", "a/1-2-0.flac": b"a", "b/1-3.trans.txt": "1-3-0 B"})
    first, second = everything(source_of({"reader": "librispeech", "path": str(tmp_path)}))
    assert [(r.source, r.reason) for r in (first, second) if isinstance(r, Reject)] == [
        ("s/a", "text: not UTF-8"),
        ("s/b#1-3-0", "recording: missing"),
    ]


# Common Voice


def test_a_clip_is_one_document_in_the_language_of_its_locale(tmp_path: Path) -> None:
    settings = media_samples.common_voice(tmp_path)
    source = source_of(settings)
    assert [item.uri for item in source.inputs()] == ["de/validated.tsv", "pt-BR/validated.tsv"]
    documents = everything(source)
    assert [item.language for item in documents if isinstance(item, Document)] == ["de"] * 3 + ["pt-BR"] * 3
    # A quotation mark is a character like any other.
    assert contents(documents)["common_voice_de_1.mp3"] == [f'"{caption(1)}', sound(1, "MP3")]
    assert len(everything(source_of(settings, split="train"))) == 2
    root = settings["path"]
    one_locale = everything(source_of(settings, path=f"{root}/de"))
    assert [item.source.partition("/")[2] for item in one_locale] == [
        f"validated.tsv#common_voice_de_{i}.mp3" for i in range(3)
    ]
    assert len(everything(source_of(settings, path=f"{root}/*/validated.tsv"))) == COUNT


def test_clips_of_few_votes_are_dropped_and_counted(tmp_path: Path) -> None:
    settings = media_samples.common_voice(tmp_path)
    results = everything(source_of(settings, path=f"{settings['path']}/de", min_votes=2))
    assert [type(item) for item in results] == [Dropped, Document, Document]
    assert results[0].reason == "min_votes"


def test_listing_does_not_look_into_the_clips(tmp_path: Path) -> None:
    settings = media_samples.common_voice(tmp_path)
    clips = Path(settings["path"]) / "de/clips"
    # Whoever walked on would find a link that leads back.
    (clips / "deeper").symlink_to(clips.parent)
    assert len(list(source_of(settings).inputs())) == 2


HEADER = "client_id\tpath\tsentence\tup_votes\tdown_votes"


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        (b"a\tb.mp3\tword", "line: wrong number of cells", "3 cells, the header names 5 columns"),
        (b"a\tb.mp3\tcaf\xe9\t1\t0", "text: not UTF-8", "not UTF-8 at its byte 11"),
        (b"a\tb.mp3\t \t1\t0", "transcript: missing", "no sentence"),
        (b"a\tabsent.mp3\tword\t1\t0", "file: unreadable", "clips/absent.mp3: cannot be read"),
        (b"a\t../secret.mp3\tword\t1\t0", "file: unsafe name", "'../secret.mp3' is no name of a file below"),
        (b"a\tb.mp3\tword\tmany\t0", "line: no votes", "'many'"),
        (b"x" * 2_000_000, "line: too long", "raise that or split it"),
    ],
)
def test_a_bad_line_is_rejected_with_its_place_and_the_rest_goes_on(
    line: bytes, reason: str, said: str, tmp_path: Path
) -> None:
    good = b"\na\tb\tfirst\t1\t0\n", b"\n\na\tb.mp3\tlast\t1\t0\r\n"
    write(tmp_path, {"de/validated.tsv": HEADER.encode() + good[0] + line + good[1], "de/clips/b.mp3": b"b"})
    first, reject, last = everything(source_of({"reader": "common_voice", "path": str(tmp_path)}, min_votes=0))
    # Early releases leave the ending off; without a column `locale` the folder tells.
    assert contents([first, last]) == {"b": ["first", b"b"], "b.mp3": ["last", b"b"]}
    assert isinstance(first, Document)
    assert first.language == "de"
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert said in reject.error


def test_a_table_of_something_else_is_rejected_once(tmp_path: Path) -> None:
    write(tmp_path, {"de/validated.tsv": "name\tsentence\nx\ty\n"})
    source = source_of({"reader": "common_voice", "path": str(tmp_path)})
    assert only_reject(source).error.endswith(
        "no column 'path' (it has: name, sentence); point `path` at a table of Common Voice"
    )
    with pytest.raises(CorpusError, match=r"no file that matches '\*/train.tsv'"):
        list(source_of({"reader": "common_voice", "path": str(tmp_path)}, split="train").inputs())
    with pytest.raises(ValidationError, match="split"):
        source_of({"reader": "common_voice", "path": str(tmp_path)}, split="../x")


# COCO


@pytest.mark.parametrize(("rule", "texts"), [("first", ["{}, said 0"]), ("all", ["{}, said 0\n{}, said 1"])])
def test_a_picture_and_its_captions_are_one_document(rule: str, texts: list[str], tmp_path: Path) -> None:
    source = source_of(media_samples.coco(tmp_path), captions=rule)
    (item,) = source.inputs()
    assert item.uri == "annotations/captions_val2017.json"
    documents = everything(source)
    expected = {
        str(100 + i): [*(t.format(caption(i), caption(i)) for t in texts), picture(i, "jpeg")] for i in range(COUNT)
    }
    assert contents(documents) == expected
    assert isinstance(documents[0], Document)
    assert [span.uri for span in documents[0].spans][1] == "s/val2017/000000000000.jpg"


def test_one_caption_is_drawn_for_each_picture(tmp_path: Path) -> None:
    settings = media_samples.coco(tmp_path)
    drawn = [
        [spans[0] for spans in contents(everything(source_of(settings, captions="one", seed=s))).values()]
        for s in range(4)
    ]
    assert {str(text)[-1] for texts in drawn for text in texts} == {"0", "1"}
    assert len({tuple(texts) for texts in drawn}) > 1


def test_pictures_may_lie_elsewhere_and_must_be_somewhere(tmp_path: Path) -> None:
    settings = media_samples.coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"no pictures for .*captions_val2017.json in .*/val2017; set its `images`"):
        list(source_of(settings).inputs())
    file = tmp_path / "annotations/captions_val2017.json"
    moved = source_of(settings, path=str(file), images=str(tmp_path / "elsewhere"))
    assert len(contents(everything(moved))) == COUNT


def test_faults_of_the_captions_are_told_once(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 1, "file_name": "1.jpg"},
        {"id": None, "file_name": "2.jpg"},
        {"id": 3, "file_name": "../3.jpg"},
        {"id": 4, "file_name": "absent.jpg"},
        {"id": 5},
        "6.jpg",
    ]
    annotations = [
        {"image_id": 1, "caption": 7},
        {"image_id": 9, "caption": "of none"},
        {"image_id": 1, "caption": "good"},
    ]
    described = json.dumps({"annotations": annotations, "images": images})
    write(tmp_path, {"annotations/captions_x.json": described, "x/1.jpg": b"one"})
    source = source_of({"reader": "coco", "path": str(tmp_path)})
    results = everything(source)
    assert contents([item for item in results if isinstance(item, Document)]) == {"1": ["good", b"one"]}
    assert sorted(item.reason for item in results if isinstance(item, Reject)) == [
        "field: missing",
        "field: wrong type",
        "file: unreadable",
        "file: unsafe name",
        "picture: missing",
        "picture: no id",
        "picture: no id",
        "picture: twice",
    ]
    (item,) = source.inputs()
    halves = [Slice(input=item, start=a, stop=b) for a, b in itertools.pairwise([0, item.size // 2, item.size])]
    assert list(source.read(halves)) == results


@pytest.mark.parametrize(
    "text", ["", "[]", '{"images": [', '{"images": [1 2]}', '{"images": {}', "{1: 2}", '{"a": [[[', "{}}x", '{"a": 1,}']
)
def test_what_is_no_json_is_rejected_once(text: str, tmp_path: Path) -> None:
    write(tmp_path, {"annotations/captions_x.json": text, "x/1.jpg": b"one"})
    reject = only_reject(source_of({"reader": "coco", "path": str(tmp_path)}))
    assert reject.reason == "json: not valid"
    assert "captions_x.json: not JSON at character" in reject.error


def test_an_id_is_the_same_as_text_and_as_number(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": "1", "file_name": "2.jpg"}]
    described = json.dumps({"images": images, "annotations": [{"image_id": "1", "caption": "good"}]})
    write(tmp_path, {"annotations/captions_x.json": described, "x/1.jpg": b"one", "x/2.jpg": b"two"})
    reject, document = everything(source_of({"reader": "coco", "path": str(tmp_path)}))
    assert isinstance(reject, Reject)
    assert reject.reason == "picture: twice"
    assert contents([document]) == {"1": ["good", b"one"]}


def test_captions_of_no_picture_are_rejected(tmp_path: Path) -> None:
    write(tmp_path, {"annotations/captions_x.json": '{"images": [], "annotations": []}', "x/1.jpg": b"one"})
    assert only_reject(source_of({"reader": "coco", "path": str(tmp_path)})).reason == "picture: none"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    value=st.dictionaries(st.sampled_from(["images", "annotations", "info", "x"]), st.lists(JSON, max_size=4) | JSON),
    indent=st.sampled_from([None, 0, 2]),
    chunk=st.integers(1, 9),
)
@example(value={"images": [0.0, 1e-30, -5]}, indent=None, chunk=1)
def test_array_items_are_those_that_the_json_module_finds(
    value: dict[str, Any], indent: int | None, chunk: int
) -> None:
    class Dripping(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(chunk)

    raw = json.dumps(value, indent=indent, ensure_ascii=chunk % 2 == 0).encode()
    names = ("images", "annotations")
    expected = [
        (name, item)
        for name, several in value.items()
        if name in names and isinstance(several, list)
        for item in several
    ]
    assert list(array_items(Dripping(raw), names)) == expected


# Folders with captions in JSON


def test_a_json_beside_a_picture_may_hold_its_caption(tmp_path: Path) -> None:
    described = json.dumps({"caption": {"en": ["one", "two"]}, "language": "en"})
    write(
        tmp_path,
        {"a.png": b"a", "a.json": described, "a.txt": "not this", "b.png": b"b", "b.txt": "this", "c.json": "{}"},
    )
    source = source_of(
        {"reader": "media_folder", "path": str(tmp_path)}, json_field="caption.en", language_field="language"
    )
    a, b, c = everything(source)
    assert isinstance(a, Document)
    assert isinstance(b, Document)
    assert ([s.text or s.data for s in a.spans], a.language) == (["one", b"a"], "en")
    assert ([s.text or s.data for s in b.spans], b.language) == (["this", b"b"], "")
    assert isinstance(c, Reject)
    assert (c.reason, c.source) == ("field: missing", "s/c")
    # Without the setting such files are left alone.
    assert len(everything(source_of({"reader": "media_folder", "path": str(tmp_path)}))) == 2


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../../b", "a\0"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match="is no name of a file below /media"):
        below("/media", name)
