"""Compressed lines: read whole, to the break where there is one, and never beyond the stated limits."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.compressed import COMPRESSED
from pipelines.corpus.documents import Document, Reject, Slice
from tests.pipelines.reading import everything, only_reject, write
from tests.pipelines.test_readers_json_lines import lines_source


def zipped(data: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        archive.mkdir("folder")
        archive.writestr("folder/x.jsonl", data)
        archive.writestr("__MACOSX/folder/._x.jsonl", b"attributes")
    return sink.getvalue()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zst,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": zipped,
}
STREAMS = [".gz", ".zst", ".bz2", ".xz"]

RNG = random.Random(3)
RECORDS = [json.dumps({"text": RNG.randbytes(30).hex(), "n": n}).encode() + b"\n" for n in range(4000)]
DATA = b"".join(RECORDS)


def texts(root: Path, **changes: object) -> tuple[list[str], list[Reject]]:
    results = everything(lines_source(root, **changes))
    documents = [r for r in results if isinstance(r, Document)]
    return [d.spans[0].text for d in documents], [r for r in results if isinstance(r, Reject)]


def test_every_compression_has_a_test() -> None:
    assert set(PACK) == set(COMPRESSED)


@pytest.mark.parametrize("ending", PACK)
def test_compressed_lines_give_what_plain_ones_give(ending: str, tmp_path: Path) -> None:
    write(tmp_path, {"plain/x.jsonl": DATA, f"packed/x.jsonl{ending}": PACK[ending](DATA)})
    (item,) = lines_source(tmp_path / "packed").inputs()
    assert (item.uri, item.divisible) == (f"x.jsonl{ending}", False)
    plain, packed = (everything(lines_source(tmp_path / name)) for name in ("plain", "packed"))
    assert len(packed) == len(RECORDS)
    for one, other in zip(plain, packed, strict=True):
        assert isinstance(one, Document)
        assert isinstance(other, Document)
        assert other.source == one.source.replace("jsonl#", f"jsonl{ending}#")
        assert other.content_hash == one.content_hash


@pytest.mark.parametrize("ending", STREAMS)
def test_concatenated_members_are_read_whole(ending: str, tmp_path: Path) -> None:
    # The borders lie within lines, and one member is empty.
    parts = [DATA[:100_001], b"", DATA[100_001:150_000], DATA[150_000:]]
    write(tmp_path, {f"x.jsonl{ending}": b"".join(map(PACK[ending], parts))})
    read, rejects = texts(tmp_path)
    assert (len(read), rejects) == (len(RECORDS), [])


def unpackable(ending: str, packed: bytes) -> bytes:
    """What the format's own library gets out of a truncated file."""
    if ending == ".gz":
        return zlib.decompressobj(31).decompress(packed)
    if ending in (".bz2", ".xz"):
        return (bz2.BZ2Decompressor() if ending == ".bz2" else lzma.LZMADecompressor()).decompress(packed)
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


@pytest.mark.parametrize("ending", STREAMS)
@settings(max_examples=12, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_gives_all_before_the_break_and_names_its_place(
    ending: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = PACK[ending](DATA)
    cut = packed[: max(1, int(share * len(packed)))]
    there = unpackable(ending, cut)
    whole_lines = there.count(b"\n")
    folder = write(tmp_path_factory.mktemp("cut"), {f"x.jsonl{ending}": cut})
    read, (reject,) = texts(folder)
    assert len(read) == whole_lines
    at = sum(map(len, RECORDS[:whole_lines]))
    assert (reject.source, reject.reason) == (f"t/x.jsonl{ending}#{at}", "archive: truncated")
    assert f"x.jsonl{ending}: line at byte {at}: the compressed file stops here" in reject.error


@pytest.mark.parametrize("ending", PACK)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_is_a_reject_whatever_it_hits(
    ending: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = bytearray(PACK[ending](b"".join(RECORDS[:300])))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    folder = write(tmp_path_factory.mktemp("damaged"), {f"x.jsonl{ending}": bytes(packed)})
    read, rejects = texts(folder)
    assert all(f"{folder}/x.jsonl{ending}: " in reject.error for reject in rejects)
    if read != [json.loads(record)["text"] for record in RECORDS[:300]]:
        assert rejects[-1].reason.startswith("archive: ")


@pytest.mark.parametrize("ending", STREAMS)
def test_what_follows_the_last_member_is_not_passed_over(ending: str, tmp_path: Path) -> None:
    damaged = bytearray(PACK[ending](DATA))
    damaged[0] ^= 1
    write(tmp_path, {f"x.jsonl{ending}": PACK[ending](DATA) + damaged})
    read, (reject,) = texts(tmp_path)
    assert len(read) == len(RECORDS)
    assert (reject.source, reject.reason) == (f"t/x.jsonl{ending}#{len(DATA)}", "archive: damaged")


@pytest.mark.parametrize("ending", STREAMS)
def test_an_empty_file_is_no_compressed_one(ending: str, tmp_path: Path) -> None:
    write(tmp_path, {f"x.jsonl{ending}": b""})
    reject = only_reject(lines_source(tmp_path))
    assert reject.reason == "archive: truncated"
    assert "empty (0 bytes)" in reject.error


def test_a_truncated_zip_and_one_of_several_files_are_refused(tmp_path: Path) -> None:
    several = io.BytesIO()
    with zipfile.ZipFile(several, "w") as archive:
        archive.writestr("a.jsonl", DATA)
        archive.writestr("b.jsonl", DATA)
    encrypted = bytearray(zipped(DATA))
    encrypted[encrypted.index(b"PK\x03\x04", 4) + 6] |= 1
    at = encrypted.index(b"PK\x01\x02", encrypted.index(b"PK\x01\x02") + 4)
    encrypted[at + 8] |= 1
    for content, reason, said in (
        (zipped(DATA)[:-30], "archive: damaged", "not a zip file"),
        (several.getvalue(), "archive: several files", "a zip of 2 files"),
        (zipped(DATA, zipfile.ZIP_LZMA), "archive: damaged", "encrypted, or not compressed by deflate"),
        (bytes(encrypted), "archive: damaged", "encrypted, or not compressed by deflate"),
    ):
        write(tmp_path, {"x.jsonl.zip": content})
        reject = only_reject(lines_source(tmp_path))
        assert (reject.source, reject.reason) == ("t/x.jsonl.zip#0", reason)
        assert said in reject.error


@pytest.mark.parametrize("ending", PACK)
def test_a_bomb_is_named_after_what_came_before_it(ending: str, tmp_path: Path) -> None:
    write(tmp_path, {f"x.jsonl{ending}": PACK[ending](DATA[:5000] + b" " * 30_000_000 + DATA)})
    read, (reject,) = texts(tmp_path, max_line_mb=1, max_expansion=5)
    assert len(read) == DATA[:5000].count(b"\n")
    assert reject.reason == "archive: bomb"
    assert "max_expansion" in reject.error
    read, (reject,) = texts(tmp_path, max_line_mb=1, max_expansion=1000)
    assert reject.reason == "line: too long", "one long line is no bomb"
    assert len(read) == len(RECORDS) - 1 + DATA[:5000].count(b"\n")


def frame(window_log: int) -> bytes:
    """A zstd frame that asks for a window, and holds one empty block."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3) + b"\x01\x00\x00"


def test_a_window_over_128_mib_is_refused_with_its_reason(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    long = stream.compress(DATA) + stream.flush()
    for content, kept in ((long, 0), (zst(DATA) + long, len(RECORDS)), (zst(DATA) + frame(41), len(RECORDS))):
        write(tmp_path, {"x.jsonl.zst": content})
        read, (reject,) = texts(tmp_path)
        assert (len(read), reject.reason) == (kept, "archive: window too large")
        assert "a window of over 128 MiB; compress the file again with a smaller one" in reject.error
    write(tmp_path, {"x.jsonl.zst": zst(DATA) + frame(27)})
    assert len(texts(tmp_path)[0]) == len(RECORDS)
    (tmp_path / "x.jsonl.zst").unlink()
    for megabytes, reasons in ((128, []), (256, ["archive: window too large"])):
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": megabytes * 2**20}]
        write(tmp_path, {"x.jsonl.xz": lzma.compress(DATA, filters=filters)})
        assert [reject.reason for reject in texts(tmp_path)[1]] == reasons


@pytest.mark.parametrize("ending", PACK)
def test_much_of_nothing_takes_no_memory(ending: str, tmp_path: Path) -> None:
    chunk = b" " * 10_000_000
    packed = zipped(chunk * 30) if ending == ".zip" else PACK[ending](chunk) * 30
    write(tmp_path, {f"x.jsonl{ending}": packed})
    code = (
        "import sys; from tests.peak import peak_kb;"
        "from tests.pipelines.test_readers_json_lines import everything, lines_source;"
        "before = peak_kb();"
        "(reject,) = everything(lines_source(sys.argv[1], max_line_mb=5, max_expansion=1e9));"
        "after = peak_kb();"
        "print(after - before, reject.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    kilobytes, _, reason = done.stdout.partition(" ")
    assert reason.strip() == "line: too long"
    assert int(kilobytes) < 60_000


def test_a_slice_of_a_compressed_file_is_the_whole_of_it(tmp_path: Path) -> None:
    """Its size is of compressed bytes, far below the offsets of its lines."""
    write(tmp_path, {"x.jsonl.gz": gzip.compress(DATA)})
    source = lines_source(tmp_path)
    (item,) = source.inputs()
    assert len(list(source.read([Slice(input=item, start=0, stop=item.size)]))) == len(RECORDS)
