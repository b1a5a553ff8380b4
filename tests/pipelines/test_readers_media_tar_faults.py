"""Tars that are damaged, cut off or hostile: whole samples are kept, the rest is named, nothing is opened or guessed at."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipelines.corpus.documents import Reject
from pipelines.corpus.tar import Tar
from tests.pipelines.reading import everything, only_reject, whole
from tests.pipelines.test_readers_media_tar import (
    FORMATS,
    Entry,
    contents,
    divided,
    special,
    tar_bytes,
    tar_source,
    write_tar,
)


@pytest.mark.parametrize(
    ("entry", "reason", "said"),
    [
        (special("k.txt", tarfile.SYMTYPE, "/etc/hostname"), "member: not a file", "is a link"),
        (special("k.txt", tarfile.LNKTYPE, "a.txt"), "member: not a file", "is a link"),
        (special("k.wav", tarfile.CHRTYPE), "member: not a file", "is a device"),
        (special("k.wav", tarfile.FIFOTYPE), "member: not a file", "is a device"),
        (("../k.txt", b"x"), "member: unsafe name", "leads out of the tar"),
        (("a/../../k.txt", b"x"), "member: unsafe name", "leads out of the tar"),
        (("/etc/k.txt", b"x"), "member: unsafe name", "leads out of the tar"),
        (("k.txt", b"x" * 2000), "sample: too large", "max_sample_mb = 0.001"),
        (("k.txt", b"caf\xe9"), "text: not UTF-8", "at byte 3"),
    ],
)
def test_a_bad_member_spoils_its_sample_alone(entry: Entry, reason: str, said: str, tmp_path: Path) -> None:
    name = entry.name if isinstance(entry, tarfile.TarInfo) else entry[0]
    file = write_tar(tmp_path / "x.tar", [("a.txt", b"first"), entry, (name[:-3] + "png", b"p"), ("z.txt", b"last")])
    first, reject, last = everything(tar_source(file, max_sample_mb=0.001))
    assert contents([first, last]) == [("a", ["first"]), ("z", ["last"])]
    assert isinstance(reject, Reject)
    assert (reject.source, reject.reason) == (f"w/x.tar#{name[:-4]}", reason)
    assert f"{tmp_path}/x.tar: member {name}" in reject.error
    assert said in reject.error


def test_a_name_twice_in_a_sample_is_rejected(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [("k.txt", b"one"), ("k.TXT", b"two")])
    assert only_reject(tar_source(file)).reason == "member: twice"


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_are_rejected_and_passed_over(format: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    with (tmp_path / "b.txt").open("wb") as file:
        # More holes than the header itself describes.
        for i in range(40):
            file.seek(i * 2**20)
            file.write(b"x" * 4096)
    (tmp_path / "c.txt").write_text("last")
    command = ["tar", "--sparse", f"--format={format}", "-cf", "x.tar", "a.txt", "b.txt", "c.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    first, sparse, last = everything(tar_source(tmp_path / "x.tar"))
    assert contents([first, last]) == [("a", ["first"]), ("c", ["last"])]
    assert isinstance(sparse, Reject)
    assert "is a sparse file" in sparse.error


def small_tar(format: int) -> bytes:
    entries = [
        ("a.txt", b"one"),
        ("a.jpg", b"j" * 600),
        ("n" * 120 + ".txt", b"two"),
        ("b.txt", b"three"),
        ("b.wav", b"w"),
    ]
    return tar_bytes(entries, format)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_a_truncated_tar_keeps_what_came_before_and_names_the_place(format: str, tmp_path: Path) -> None:
    raw = small_tar(FORMATS[format])
    file = tmp_path / "x.tar"
    file.write_bytes(raw)
    expected = everything(tar_source(file))
    assert len(expected) == 3
    *_, last = Tar(io.BytesIO(raw), seekable=True).members()
    for length in range(0, last.data + 512 + 1, 64):
        file.write_bytes(raw[:length])
        *kept, lost = results = everything(tar_source(file))
        assert kept == expected[: len(kept)]
        assert isinstance(lost, Reject)
        assert (lost.source, lost.reason) == (
            expected[len(kept)].source if length >= 512 else "w/x.tar",
            "tar: truncated",
        )
        assert f"{file}: nothing from" in lost.error
        assert divided(tar_source(file), range(0, length, 300)) == results


def test_a_damaged_header_is_never_passed_over_in_silence(tmp_path: Path) -> None:
    raw = small_tar(tarfile.PAX_FORMAT)
    file = tmp_path / "x.tar"
    file.write_bytes(raw)
    expected = everything(tar_source(file))
    headers = [m.begin for m in Tar(io.BytesIO(raw), seekable=True).members()]
    silent = 0
    for position in (start + byte for start in headers for byte in range(0, 512, 5)):
        file.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        results = divided(tar_source(file), range(0, len(raw), 700))
        silent += results == expected
        if results != expected:
            *kept, lost = results
            assert kept == expected[: len(kept)]
            assert isinstance(lost, Reject)
            assert lost.reason in ("tar: damaged", "tar: truncated")
    # The checksum's own last byte means nothing.
    assert silent <= len(headers)


def test_a_size_beyond_any_disk_is_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 2**80
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    assert only_reject(tar_source(tmp_path)).reason == "tar: damaged"


def test_what_is_no_tar_is_rejected(tmp_path: Path) -> None:
    for content in (b"\x1f\x8b" + b"gzip" * 400, b"x" * 5000, json.dumps({"a": "b" * 900}).encode()):
        (tmp_path / "x.tar").write_bytes(content)
        reject = only_reject(tar_source(tmp_path))
        assert (reject.reason, reject.source) == ("tar: damaged", "w/x.tar")
        assert "no tar header at byte 0" in reject.error


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_what_follows_the_end_of_a_tar_is_not_passed_over_in_silence(name: str, tmp_path: Path) -> None:
    raw = tar_bytes([("a.txt", b"one"), ("b.txt", b"two")]) + tar_bytes([("c.txt", b"three")])
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    source = tar_source(tmp_path)
    one, two, lost = results = everything(source)
    assert contents([one, two]) == [("a", ["one"]), ("b", ["two"])]
    assert isinstance(lost, Reject)
    assert (lost.source, lost.reason) == (f"w/{name}", "tar: more behind its end")
    if name == "x.tar":
        assert divided(source, range(0, len(raw), 300)) == results


def test_a_tar_that_vanishes_after_the_listing_is_rejected(tmp_path: Path) -> None:
    source = tar_source(write_tar(tmp_path / "x.tar", [("a.txt", b"word")]))
    slices = whole(source.inputs())
    (tmp_path / "x.tar").unlink()
    (reject,) = source.read(slices)
    assert isinstance(reject, Reject)
    assert reject.reason == "file: unreadable"


def test_memory_holds_one_sample_not_the_tar(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        for name, size in (("a.txt", 4), ("huge.wav", 2**30), ("huge.npy", 2**30), ("z.txt", 4)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf() + b"word".ljust(512))
            # A hole.
            file.seek(-(-size // 512) * 512 - 512, 1)
        file.write(bytes(1024))
    code = (
        "import sys; from tests.peak import peak_kb; from pipelines.corpus.documents import Slice;"
        "from pipelines.corpus.webdataset import WebDatasetSource;"
        "source = WebDatasetSource(reader='webdataset', name='w', path=sys.argv[1], max_sample_mb=5);"
        "(item,) = source.inputs();"
        "before = peak_kb();"
        "count = sum(1 for _ in source.read([Slice(input=item, start=0, stop=item.size)]));"
        "print(count, peak_kb() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 3
    assert kilobytes < 20_000
