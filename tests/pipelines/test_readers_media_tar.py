"""WebDataset tars: what the format's library and Python's tarfile find in them, exactly once, however they are divided."""

from __future__ import annotations

import io
import itertools
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines.corpus import tar
from pipelines.corpus.documents import Document, Reject, Slice
from pipelines.corpus.tar import Tar
from pipelines.corpus.webdataset import WebDatasetSource
from pipelines.sequence import Modality
from tests.pipelines import media_samples
from tests.pipelines.media_samples import picture, sound
from tests.pipelines.reading import everything

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

Entry = tuple[str, bytes] | tarfile.TarInfo


def tar_source(path: Path | str, **changes: Any) -> WebDatasetSource:
    settings = {"reader": "webdataset", "name": "w", "path": str(path), "templates": ["{text}{image}{audio}"]}
    return WebDatasetSource.model_validate(settings | changes)


def write_tar(file: Path, entries: Iterable[Entry], format: int = tarfile.PAX_FORMAT) -> Path:
    file.write_bytes(tar_bytes(entries, format))
    return file


def tar_bytes(entries: Iterable[Entry], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def contents(results: Iterable[object]) -> list[tuple[str, list[str | bytes]]]:
    """Of documents: key, and what their spans hold."""
    found = []
    for item in results:
        assert isinstance(item, Document), item
        found.append((item.source.partition("#")[2], [span.text or span.content for span in item.spans]))
    return found


def divided(source: WebDatasetSource, cuts: Iterable[int]) -> list[Document | Reject]:
    """Everything, each input read in slices, and each slice by itself."""
    results = []
    for item in source.inputs():
        for start, stop in itertools.pairwise(borders_of(item.size, cuts)):
            results += source.read([Slice(input=item, start=start, stop=stop)])
    return results


def reversed_slices(file: Path, cuts: Iterable[int]) -> list[Document | Reject]:
    """As `divided`, but the last slice is read first, so that none begins where another one ended."""
    source = tar_source(file)
    pieces: list[list[Document | Reject]] = []
    for item in source.inputs():
        borders = borders_of(item.size, cuts)
        for start, stop in reversed(list(itertools.pairwise(borders))):
            pieces.insert(0, list(source.read([Slice(input=item, start=start, stop=stop)])))
    return [result for piece in pieces for result in piece]


def borders_of(size: int, cuts: Iterable[int]) -> list[int]:
    return [0, *sorted({cut % size for cut in cuts} - {0}), size] if size else [0, 0]


def test_a_slice_behind_one_that_was_read_begins_where_that_one_ended(tmp_path: Path) -> None:
    entries = [(f"{number:03}.txt", b"x" * 3000) for number in range(200)]
    (item,) = tar_source(write_tar(tmp_path / "x.tar", entries)).inputs()
    source = tar_source(tmp_path / "x.tar")
    borders = [0, *range(item.size // 10, item.size, item.size // 10), item.size]
    slices = [Slice(input=item, start=start, stop=stop) for start, stop in itertools.pairwise(borders)]
    walked: list[int] = []
    check = tar._checked_size

    def counting(header: bytes, offset: int) -> int:
        walked[-1] += 1
        return check(header, offset)

    def read(some: Iterable[Slice]) -> list[str]:
        found = []
        for piece in some:
            walked.append(0)
            found += [document.source for document in source.read([piece])]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar, "_checked_size", counting)
        assert len(read(slices)) == 200
        assert max(walked) < 200 / 10 + 5
        # A worker that does every other unit walks over one between them.
        source = tar_source(tmp_path / "x.tar")
        walked.clear()
        some = read(slices[1::2])
        assert walked[0] < 2 * 200 / 10 + 5
        assert max(walked[1:]) < 2 * 200 / 10 + 5
    assert some == [
        document.source for piece in slices[1::2] for document in tar_source(tmp_path / "x.tar").read([piece])
    ]


def test_the_librarys_own_shards_are_read(tmp_path: Path) -> None:
    media_samples.web_dataset(tmp_path)
    inputs = list(tar_source(tmp_path).inputs())
    assert [(item.uri, item.divisible) for item in inputs] == [("train-0000.tar", True), ("train-0001.tar", True)]
    first, *others = everything(tar_source(tmp_path))
    assert isinstance(first, Document)
    assert first.source == "w/train-0000.tar#00000"
    assert [(s.modality, s.text, s.data, s.uri) for s in first.spans] == [
        (Modality.TEXT, "the fox number 0", b"", "w/train-0000.tar/00000.txt"),
        (Modality.IMAGE, "", picture(0, "jpeg"), "w/train-0000.tar/00000.jpg"),
    ]
    assert [item.source for item in others][-2:] == ["w/train-0001.tar#00004", "w/train-0001.tar#00005"]


def test_a_json_field_stands_in_place_of_the_text_member(tmp_path: Path) -> None:
    media_samples.web_dataset(tmp_path)
    source = tar_source(tmp_path, json_field="url", language_field="meta.language", templates=["{language}: {text}"])
    documents = everything(source)
    assert {item.language for item in documents if isinstance(item, Document)} == {"en"}
    assert contents(documents)[0] == ("00000", ["en: http://x"])
    reject = everything(tar_source(tmp_path, json_field="alt"))[0]
    assert isinstance(reject, Reject)
    assert reject.reason == "field: missing"
    assert f"{tmp_path}/train-0000.tar: member 00000.json: no field 'alt' (it has: caption, meta, url)" in reject.error


NAME = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "./", "a/", "a.b/", "a/é/", "x" * 90 + "/", "y" * 160 + "/", "__meta__/"]),
    st.sampled_from(["k", "l", "ключ", "n" * 120]),
    st.sampled_from(["txt", "TXT", "jpg", "seg.png", "wav", "cls", "npy", "pyd", ""]),
)
ENTRY = st.one_of(
    st.tuples(NAME, st.binary(min_size=1, max_size=700).map(lambda b: b.replace(b"\0", b"x"))),
    st.builds(special, st.sampled_from(["k", "a/k.d"]), st.just(tarfile.DIRTYPE)),
    st.builds(special, st.sampled_from(["k.cls", "a/none"]), st.just(tarfile.SYMTYPE), st.just("elsewhere")),
)


def as_text(entries: Iterable[Entry]) -> list[Entry]:
    """Texts that are UTF-8 and not blank, and no name twice in a row: what the library would refuse."""
    result: dict[str, Entry] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, tarfile.TarInfo):
            result[f"{index}"] = entry
        else:
            name, data = entry
            readable = data.hex().encode() if name.lower().endswith("txt") else data
            result.setdefault(name.lower(), (name, readable))
    return list(result.values())


def as_the_library_reads(raw: bytes) -> Iterator[tuple[str, list[str | bytes]]]:
    """What a sample has of known extensions, text first and then pictures and sounds, as the template lays it out."""
    for sample in group_by_keys(tar_file_expander([{"url": "x", "stream": io.BytesIO(raw)}])):
        texts, pictures, sounds = (
            [data for name, data in sample.items() if name.rpartition(".")[2] in known]
            for known in (["txt"], ["jpg", "png"], ["wav"])
        )
        if texts or pictures or sounds:
            yield sample["__key__"], ["\n".join(text.decode() for text in texts)] * bool(texts) + pictures + sounds


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(ENTRY, max_size=9).map(as_text),
    format=st.sampled_from(list(FORMATS.values())),
    cuts=st.lists(st.one_of(st.integers(0, 10**6), st.integers(0, 60).map(lambda block: block * 512)), max_size=4),
)
def test_any_division_gives_what_the_library_finds_once_and_in_order(
    entries: list[Entry], format: int, cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if format == tarfile.USTAR_FORMAT:
        # This format has no longer names.
        entries = [e for e in entries if isinstance(e, tarfile.TarInfo) or max(map(len, e[0].split("/"))) < 50]
    file = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", entries, format)
    source = tar_source(file)
    results = divided(source, cuts)
    bare = [item for item in results if isinstance(item, Reject)]
    assert {item.reason for item in bare} <= {"sample: nothing to take"}
    assert contents(item for item in results if item not in bare) == list(as_the_library_reads(file.read_bytes()))
    assert results == everything(tar_source(file))
    assert results == reversed_slices(file, cuts)
    assert len({(item.source, item.position) for item in results}) == len(results)


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_tarfile_finds_them(format: str) -> None:
    names = ["a.txt", f"{'d' * 80}/{'n' * 90}.txt"]
    if format != "ustar":
        names += ["n" * 300 + ".txt", "é" * 120 + ".jpg"]
    raw = tar_bytes([*((name, name.encode() * 9) for name in names), special("dir", tarfile.DIRTYPE)], FORMATS[format])
    walk = Tar(io.BytesIO(raw), seekable=True)
    found = [(member, walk.content(member)) for member in walk.members()]
    with tarfile.open(fileobj=io.BytesIO(raw)) as known:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in known]
    assert [(m.name.rstrip("/"), m.begin, m.data, m.size) for m, _ in found] == expected
    assert [content for _, content in found] == [name.encode() * 9 for name in names] + [b""]


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_read(format: str, tmp_path: Path) -> None:
    folder = tmp_path / "raw/some/folder"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"number {i}")
        (folder / f"{i}.png").write_bytes(picture(i))
    subprocess.run(
        ["tar", f"--format={format}", "--sort=name", "-cf", tmp_path / "x.tar", "some"],
        cwd=tmp_path / "raw",
        check=True,
    )
    expected = [(f"some/folder/{i}", [f"number {i}", picture(i)]) for i in range(3)]
    assert contents(everything(tar_source(tmp_path / "x.tar"))) == expected


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst", "tar.bz2"])
def test_compressed_tars_are_streamed_whole(ending: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    media_samples.web_dataset(tmp_path / "plain")
    plain = (tmp_path / "plain/train-0000.tar").read_bytes()
    codec = {"tar.gz": "gzip", "tgz": "gzip", "tar.zst": "zstd", "tar.bz2": "bz2"}[ending]
    with pa.CompressedOutputStream(str(tmp_path / f"x.{ending}"), codec) as file:
        file.write(plain)
    source = tar_source(tmp_path / f"x.{ending}")
    assert [item.divisible for item in source.inputs()] == [False]
    documents = everything(source)
    assert contents(documents) == contents(everything(tar_source(tmp_path / "plain/train-0000.tar")))
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes((tmp_path / f"x.{ending}").read_bytes()[:-300])
    *kept, lost = everything(tar_source(cut))
    assert contents(kept) == contents(documents)[: len(kept)]
    assert isinstance(lost, Reject)
    assert lost.reason in ("archive: truncated", "tar: truncated")


def test_a_key_that_comes_again_is_another_document(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [("k.txt", b"one"), ("l.txt", b"two"), ("k.txt", b"three")])
    one, two, three = everything(tar_source(file))
    assert contents([one, two, three]) == [("k", ["one"]), ("l", ["two"]), ("k", ["three"])]
    assert isinstance(one, Document)
    assert isinstance(three, Document)
    assert one.source == three.source
    assert one.row_id != three.row_id


def test_only_the_named_extensions_are_taken(tmp_path: Path) -> None:
    entries = [("k.jpg", b"j"), ("k.mask.jpg", b"m"), ("k.txt", b"t"), ("k.wav", b"w")]
    file = write_tar(tmp_path / "x.tar", entries)
    assert contents(everything(tar_source(file))) == [("k", ["t", b"j", b"m", b"w"])]
    assert contents(everything(tar_source(file, extensions=["jpg", "wav"]))) == [("k", [b"j", b"w"])]
    with pytest.raises(ValidationError, match="'npy' is of no known kind"):
        tar_source(file, extensions=["npy"])


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    names = ("a.pyd", "a.pickle", "a.pkl", "a.pth", "a.pt", "a.npy", "a.ten")
    file = write_tar(tmp_path / "x.tar", [*((name, bomb) for name in names), ("b.txt", b"word")])
    reject, document = everything(tar_source(file))
    assert isinstance(reject, Reject)
    assert reject.reason == "sample: nothing to take"
    assert "sample a has only pyd, pickle, pkl, pth, pt, npy, ten" in reject.error
    assert contents([document]) == [("b", ["word"])]
    assert not (tmp_path / "opened").exists()


def test_a_wav_and_a_caption_of_the_librarys_tar_writer_go_together(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "a/b", "flac": sound(1, "FLAC"), "caption": "said"})
    assert contents(everything(tar_source(tmp_path))) == [("a/b", ["said", sound(1, "FLAC")])]
