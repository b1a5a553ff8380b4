"""Lines, archives, tables and ids that are damaged, hostile or merely odd, each with what shall become of it."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipelines.bad_media import RATE, Files, Kind
from tests.pipelines.media_samples import picture
from tests.pipelines.test_readers_compressed import frame, zst
from tests.pipelines.test_readers_media_layouts import HEADER
from tests.pipelines.test_readers_media_tar import Entry, special, tar_bytes
from tests.pipelines.test_sound_files import clip, encoded

FIRST, LAST = "the first fox", "the last dog"
"""Stand before and behind each bad record."""

BOTH = (FIRST, LAST)

JSONL = {"reader": "jsonl", "max_line_mb": 0.3}


def line(text: str, **more: Any) -> bytes:
    return json.dumps({"text": text} | more).encode() + b"\n"


def lines(bad: bytes, reason: str = "", says: str = "", texts: tuple[str, ...] = BOTH, **settings: Any) -> Kind:
    """A line among good ones."""
    content = line(FIRST) + bad + b"\n" + line(LAST)
    return Kind(files={"x.jsonl": content}, settings=JSONL | settings, reason=reason, says=says, texts=texts)


def packed(ending: str, content: bytes, reason: str = "", says: str = "", texts: tuple[str, ...] = ()) -> Kind:
    settings = JSONL | {"max_expansion": 20}
    return Kind(files={f"x.jsonl{ending}": content}, settings=settings, reason=reason, says=says, texts=texts)


def tar(*entries: Entry, reason: str = "", says: str = "", texts: tuple[str, ...] = BOTH, **settings: Any) -> Kind:
    """Members among good samples."""
    content = tar_bytes([("a.txt", FIRST.encode()), *entries, ("z.txt", LAST.encode())])
    return tar_file(content, reason, says, texts, **settings)


def tar_file(
    content: bytes, reason: str, says: str = "", texts: tuple[str, ...] = BOTH, name: str = "x.tar", **settings: Any
) -> Kind:
    reader = {"reader": "webdataset", "max_sample_mb": 0.01} | settings
    return Kind(files={name: content}, settings=reader, reason=reason, says=says, texts=texts)


def table(columns: dict[str, Any], **how: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True, compression="none", use_dictionary=False, **how)
    return sink.getvalue()


def rows(
    content: bytes,
    reason: str,
    says: str = "",
    texts: tuple[str, ...] = BOTH,
    files: Files | None = None,
    **fields: Any,
) -> Kind:
    settings = {"reader": "parquet", "text_field": "text"} | fields
    return Kind(files={"x.parquet": content, **(files or {})}, settings=settings, reason=reason, says=says, texts=texts)


def page(reader: str, bad: dict[str, Any], reason: str, says: str = "", **settings: Any) -> Kind:
    """A record of pictures among good ones."""
    good: Callable[[str], dict[str, Any]] = (
        (lambda text: {"images": [None], "texts": [text]})
        if reader == "obelics"
        else (lambda text: {"text_list": [text], "image_info": []})
    )
    content = "\n".join(json.dumps(record) for record in (good(FIRST), bad, good(LAST)))
    files = {"x.jsonl": content, "media/0.png": picture(0), "secret.png": picture(1)}
    return Kind(files=files, settings={"reader": reader, **settings}, reason=reason, says=says, texts=BOTH)


def ids(
    bad: dict[str, Any], reason: str, says: str = "", content: str = "spans", stated: str = "text image audio"
) -> Kind:
    """A record of ids among texts; `sequences` cannot hold these, and stand alone."""
    good = [{"spans": [{"modality": "text", "text": text}]} for text in BOTH] if content == "spans" else []
    content_lines = "\n".join(json.dumps(record) for record in (*good[:1], bad, *good[1:]))
    made_with = [f"{modality}_sha256" for modality in stated.split()]
    settings = {"reader": "tokenized", "content": content, "made_with": made_with}
    texts = BOTH if good else ()
    return Kind(files={"x.jsonl": content_lines}, settings=settings, reason=reason, says=says, texts=texts)


def _lines() -> dict[str, Kind]:
    return {
        "line-too-long": lines(b'{"text": "%s"}' % (b"x" * 400_000), "line: too long", "max_line_mb"),
        "line-latin-1": lines(b'{"text": "caf\xe9"}', "text: not UTF-8", "at byte 13"),
        "line-utf-16": lines('{"text": "x"}'.encode("utf-16-le"), "json: not valid"),
        "line-of-half-a-surrogate": lines(b'{"text": "\\ud800"}', "text: not Unicode", "surrogate"),
        "line-too-deep": lines(b'{"text": ' + b"[" * 100_000, "json: not valid", "not JSON"),
        "line-with-a-vast-number": lines(b'{"text": "x", "n": %s}' % (b"9" * 9000), "json: not valid"),
        "line-of-no-json": lines(b"{'text': 1}", "json: not valid"),
        "line-that-breaks": lines(b'{"text": "the qui', "json: not valid", "control character"),
        "line-cut-off": Kind(
            files={"x.jsonl": line(FIRST) + line(LAST) + b'{"text": "the qui'},
            settings=JSONL,
            reason="json: not valid",
            says="Unterminated string",
            texts=BOTH,
        ),
        "line-of-a-list": lines(b'["text"]', "json: no object", "list"),
        "line-without-the-field": lines(b'{"txet": "x"}', "field: missing", "it has: txet"),
        "line-of-another-type": lines(b'{"text": 1}', "field: wrong type", "int"),
        "line-without-text": lines(b'{"text": " "}', "text: empty"),
        "line-of-an-id-twice": Kind(
            files={"x.jsonl": line(FIRST, id=1) + line("other", id=1) + line(LAST, id=2)},
            settings=JSONL | {"id_field": "id"},
            reason="row id: twice",
            texts=BOTH,
        ),
        "line-with-a-key-twice": lines(b'{"text": "no", "text": "a fox"}', texts=(*BOTH, "a fox")),
        "line-with-nan": lines(b'{"text": "a fox", "score": NaN}', texts=(*BOTH, "a fox")),
        "line-with-nul": lines(b'{"text": "a\\u0000fox"}', texts=(*BOTH, "a\0fox")),
        "lines-of-windows": lines(b'{"text": "a fox"}\r\n\r\n\t', texts=(*BOTH, "a fox")),
        "lines-in-no-folder": lines(b"\x00" * 1000, "json: not valid"),
    }


def _archives() -> dict[str, Kind]:
    # So that there is something to cut.
    noise = random.Random(1).randbytes(3000).hex()
    data = line(FIRST) + line(LAST) + line("x", n=noise)
    several = io.BytesIO()
    with zipfile.ZipFile(several, "w") as archive:
        archive.writestr("a.jsonl", data)
        archive.writestr("b.jsonl", data)
    damaged = bytearray(gzip.compress(data))
    damaged[-1500:-1400] = bytes(100)
    bomb = line(FIRST) + b" " * 30_000_000
    # Of one line, as binary files go.
    inner = next(c for c in (gzip.compress(line(FIRST), mtime=n) for n in range(99)) if b"\n" not in c)
    return {
        "archive-truncated": packed(".gz", gzip.compress(data)[:-800], "archive: truncated", texts=BOTH),
        "archive-damaged": packed(".gz", bytes(damaged), "archive: damaged"),
        "archive-of-0-bytes": packed(".zst", b"", "archive: truncated", "empty (0 bytes)"),
        "archive-bomb": packed(".gz", gzip.compress(bomb), "archive: bomb", "max_expansion", texts=(FIRST,)),
        "archive-bomb-zstd": packed(".zst", zst(bomb), "archive: bomb", texts=(FIRST,)),
        "archive-in-an-archive": packed(".gz", gzip.compress(inner), "text: not UTF-8"),
        "archive-window-too-large": packed(".zst", zst(data[:70]) + frame(41), "archive: window too large", texts=BOTH),
        "archive-of-several-files": packed(".zip", several.getvalue(), "archive: several files", "2 files"),
        "archive-that-is-none": packed(".gz", data, "archive: damaged"),
        "archive-of-another-kind": packed(".gz", zst(data), "archive: damaged"),
        "archive-in-members": packed(".gz", gzip.compress(line(FIRST)) + gzip.compress(line(LAST)), texts=BOTH),
    }


def _tars() -> dict[str, Kind]:
    whole = tar_bytes([("a.txt", FIRST.encode()), ("b.txt", LAST.encode()), ("c.txt", b"lost" * 400)])
    header = bytearray(whole)
    header[2 * 1024 + 3] ^= 1
    hole = special("k.txt", tarfile.GNUTYPE_SPARSE)
    two = whole[:2048]

    def vast(size: int) -> bytes:
        info = tarfile.TarInfo("k.txt")
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)

    long = tarfile.TarInfo("k.txt")
    long.pax_headers = {"comment": "x" * 2_000_000}
    bomb = gzip.compress(tar_bytes([("a.txt", FIRST.encode()), ("k.bin", bytes(40_000_000))]))
    return {
        "member-leads-out": tar(("../k.txt", b"x"), reason="member: unsafe name", says="leads out"),
        "member-leads-out-from-within": tar(("a/../../k.txt", b"x"), reason="member: unsafe name"),
        "member-is-absolute": tar(("/etc/k.txt", b"x"), reason="member: unsafe name"),
        "member-is-a-symlink": tar(
            special("k.txt", tarfile.SYMTYPE, "/etc/passwd"), reason="member: not a file", says="link"
        ),
        "member-is-a-hard-link": tar(special("k.txt", tarfile.LNKTYPE, "a.txt"), reason="member: not a file"),
        "member-is-a-device": tar(special("k.wav", tarfile.CHRTYPE), reason="member: not a file", says="device"),
        "member-is-a-pipe": tar(special("k.wav", tarfile.FIFOTYPE), reason="member: not a file"),
        "member-is-sparse": tar(hole, reason="member: not a file", says="sparse"),
        "member-twice": tar(("k.txt", b"one"), ("k.TXT", b"two"), reason="member: twice"),
        "sample-too-large": tar(("k.txt", b"x" * 20_000), reason="sample: too large", says="max_sample_mb"),
        "sample-of-pickles": tar(("k.pkl", b"cos\nsystem\n"), ("k.pth", b"\x80"), reason="sample: nothing to take"),
        "member-not-utf-8": tar(("k.txt", b"caf\xe9"), reason="text: not UTF-8"),
        "member-of-a-name-that-is-no-text": tar(("caf\udce9.txt", b"a fox"), texts=(*BOTH, "a fox")),
        "tar-truncated": tar_file(whole[: 2 * 1024 + 512 + 700], "tar: truncated", "700 of 1600 bytes"),
        "tar-without-an-end": tar_file(whole[: 2 * 1024], "tar: truncated", "without the mark", (FIRST,)),
        "tar-of-0-bytes": tar_file(b"", "tar: truncated", texts=()),
        "tar-with-a-damaged-header": tar_file(bytes(header), "tar: damaged", "checksum", (FIRST,)),
        "tar-that-is-none": tar_file(b"no tar" * 400, "tar: damaged", "no tar header", texts=()),
        "tar-of-a-member-of-a-terabyte": tar_file(two + vast(2**40), "tar: truncated", "ends before byte"),
        "tar-of-a-member-that-no-disk-holds": tar_file(
            two + vast(2**50), "tar: damaged", "bytes at byte 2048", (FIRST,)
        ),
        "tar-of-a-vast-header": tar(long, reason="tar: damaged", says="states 2000", texts=()),
        "tars-put-together": tar_file(
            tar_bytes([("a.txt", FIRST.encode()), ("b.txt", LAST.encode())]) + whole, "tar: more behind its end"
        ),
        "tar-bomb": tar_file(bomb, "archive: bomb", texts=(FIRST,), name="x.tar.gz", max_expansion=20),
    }


def _tables() -> dict[str, Kind]:
    three = [FIRST, "the middle", LAST]
    good = table({"text": [FIRST, LAST]})
    flipped = bytearray(table({"text": three}, row_group_size=2, write_statistics=False))
    flipped[flipped.find(b"the last")] ^= 1
    texts = pa.array([FIRST.encode(), b"caf\xe9", LAST.encode()]).view(pa.string())
    pictures: dict[str, Any] = {"image_field": "image", "media": "media", "templates": ["{text}{image}"]}
    named = {"text": three, "image": [None, "../secret.png", None]}
    beside = {"secret.png": picture(0), "media/0.png": picture(0)}
    return {
        "table-truncated": rows(good[:-9], "parquet: damaged", "no whole Parquet file", ()),
        "table-that-is-none": rows(b"no table" * 99, "parquet: damaged", texts=()),
        "table-of-0-bytes": rows(b"", "parquet: damaged", texts=()),
        "table-with-a-flipped-bit": rows(bytes(flipped), "parquet: damaged", "row group 1", (FIRST, "the middle")),
        "table-without-the-column": rows(table({"other": ["x"]}), "field: missing", "it has: other", ()),
        "table-of-another-type": rows(table({"text": [7]}), "field: wrong type", "int", ()),
        "table-not-utf-8": rows(table({"text": texts}), "text: not UTF-8"),
        "table-that-leads-out": rows(table(named), "file: unsafe name", "'../secret.png'", files=beside, **pictures),
        "table-without-bytes": rows(table(named), "media: not in the table", image_field="image"),
        "table-of-pictures-that-are-lists": rows(
            table({"text": [FIRST, "x"], "image": [None, [1, 2]]}),
            "field: wrong type",
            "expected bytes",
            (FIRST,),
            **pictures,
        ),
        "table-of-vast-row-groups": rows(good, "parquet: row group too large", texts=(), max_row_group_mb=1e-5),
        "table-of-empty-rows": rows(table({"text": [FIRST, None, LAST]}), "document: empty"),
    }


def _layouts() -> dict[str, Kind]:
    wav = encoded(clip(0.2, 1, RATE), "WAV", "PCM_16", RATE)

    def chapter(reason: str, transcripts: str, *recordings: str) -> Kind:
        recorded = {f"1/2/{name}": wav for name in ("1-2-0.wav", *recordings)}
        files = {"1/2/1-2.trans.txt": f"1-2-0 {FIRST}\n{transcripts}"} | recorded
        settings = {"reader": "librispeech", "templates": ["{text}"]}
        return Kind(files=files, settings=settings, reason=reason, texts=(FIRST,))

    def clips(row: str, reason: str, says: str = "", header: str = HEADER, texts: tuple[str, ...] = (FIRST,)) -> Kind:
        content = f"{header}\na\tb.wav\t{FIRST}\t1\t0\n{row}\n"
        settings = {"reader": "common_voice", "min_votes": 0, "templates": ["{text}"]}
        files = {"de/validated.tsv": content, "de/clips/b.wav": wav, "de/secret.wav": wav}
        return Kind(files=files, settings=settings, reason=reason, says=says, texts=texts)

    def captions(images: object, annotations: object, reason: str, says: str = "") -> Kind:
        first = {"id": 1, "file_name": "1.png"}, {"image_id": 1, "caption": FIRST}
        described = {"images": [first[0], images] if images else [first[0]], "annotations": [first[1], annotations]}
        files = {"annotations/captions_x.json": json.dumps(described), "x/1.png": picture(0), "secret.png": picture(0)}
        settings = {"reader": "coco", "templates": ["{text}"]}
        return Kind(files=files, settings=settings, reason=reason, says=says, texts=(FIRST,))

    broken = {"annotations/captions_x.json": '{"images": [{"id": 1', "x/1.png": picture(0)}
    none = {"annotations/captions_x.json": '{"images": []}', "x/1.png": picture(0)}
    ok = {"image_id": 1, "caption": "other"}
    return {
        "speech-without-a-transcript": chapter("transcript: missing", "", "1-2-1.wav"),
        "speech-recorded-twice": chapter("recording: twice", "1-2-1 twice\n", "1-2-1.wav", "1-2-1.flac"),
        "speech-transcribed-twice": chapter("transcript: twice", "1-2-1 one\n1-2-1 other\n", "1-2-1.wav"),
        "speech-without-its-recording": chapter("recording: missing", "1-2-1 lost\n"),
        "clip-of-few-cells": clips("a\tb.wav\tword", "line: wrong number of cells", "3 cells"),
        "clip-that-leads-out": clips("a\t../secret.wav\tword\t1\t0", "file: unsafe name"),
        "clip-without-votes": clips("a\tb.wav\tword\tmany\t0", "line: no votes"),
        "clip-that-is-not-there": clips("a\tgone.wav\tword\t1\t0", "file: unreadable"),
        "clips-of-another-table": clips("", "table: column missing", "no column 'path'", "a\tb\tc\td\te", ()),
        "captions-cut-off": Kind(files=broken, settings={"reader": "coco"}, reason="json: not valid", texts=()),
        "captions-of-no-picture": Kind(files=none, settings={"reader": "coco"}, reason="picture: none", texts=()),
        "captions-of-a-picture-twice": captions({"id": 1, "file_name": "2.png"}, ok, "picture: twice"),
        "captions-of-a-picture-without-id": captions({"file_name": "2.png"}, ok, "picture: no id"),
        "captions-of-a-picture-that-is-not-listed": captions(None, {"image_id": 9, "caption": "x"}, "picture: missing"),
        "captions-that-lead-out": captions({"id": 2, "file_name": "../secret.png"}, ok, "file: unsafe name"),
    }


def _pages() -> dict[str, Kind]:
    def mmc4(reason: str, says: str = "", media: str | None = "media", **info: Any) -> Kind:
        info = {"image_name": "0.png", "raw_url": "http://x", "matched_text_index": 0} | info
        settings = {"media": media} if media else {}
        return page("mmc4", {"text_list": ["bad"], "image_info": [info]}, reason, says, **settings)

    def obelics(images: list[Any], texts: list[Any], reason: str, says: str = "", **settings: Any) -> Kind:
        return page("obelics", {"images": images, "texts": texts}, reason, says, **settings)

    return {
        "page-of-unequal-lists": obelics([None], ["a", "b"], "obelics: unequal lists", "1 images and 2 texts"),
        "page-of-both-at-once": obelics(["0.png"], ["a"], "obelics: not one of two", "both", media="media"),
        "page-of-nothing": obelics([], [], "document: empty"),
        "page-of-a-url-that-is-none": obelics(["http://[x/a.png"], [None], "media: not a URL", media="media"),
        "page-without-its-folder": obelics(["0.png"], [None], "media: not in the record", "set `media`"),
        "page-of-a-picture-that-is-not-there": obelics(["9.png"], [None], "media: missing", media="media"),
        "page-that-leads-out": obelics(["http://x/%2e%2e%2fsecret.png"], [None], "file: unsafe name", media="media"),
        "page-of-no-such-sentence": mmc4("mmc4: no such sentence", matched_text_index=7),
        "page-of-a-name-that-leads-out": mmc4("file: unsafe name", image_name="../secret.png"),
        "page-of-a-name-with-nul": mmc4("file: unsafe name", image_name="a\0.png"),
        "page-of-a-picture-number": mmc4("field: wrong type", image_name=7),
    }


def _ids() -> dict[str, Kind]:
    def span(modality: str, codes: Any) -> dict[str, Any]:
        return {"spans": [{"modality": modality, "codes": codes}]}

    large = np.zeros((40, 40), int).tolist()
    # 350 pieces, then `<|document|>`.
    opened = {"token_ids": [350, 5], "modality_ids": [0, 0]}
    return {
        "ids-out-of-range": ids(span("image", [[1, 32]]), "tokens: out of range", "id 32 lies outside 0..31"),
        "ids-below-zero": ids(span("text", [-1]), "tokens: out of range"),
        "ids-that-are-fractions": ids(span("text", [1.5]), "tokens: no whole number"),
        "ids-that-are-true": ids(span("text", [True]), "tokens: no whole number"),
        "ids-of-uneven-rows": ids(span("image", [[1, 2], [3]]), "tokens: wrong shape"),
        "ids-of-no-list": ids(span("text", 7), "tokens: wrong shape"),
        "ids-of-a-smell": ids(span("smell", [1]), "tokens: no span"),
        "ids-of-a-picture-too-large": ids(span("image", large), "tokens: span too long", "sequence_length"),
        "ids-of-too-many-codebooks": ids(span("audio", [[1, 2, 3, 4, 5]]), "tokens: not a document"),
        "ids-of-who-knows-what": ids(span("image", [[1]]), "tokens: unknown tokenizer", stated="text"),
        "ids-of-an-unclosed-document": ids(opened, "tokens: not a document", "stops before", "sequences"),
    }


RECORDS = _lines() | _archives() | _tars() | _tables() | _layouts() | _pages() | _ids()
