"""Readers `obelics` and `mmc4`: pictures and texts in the order of the page, whatever way the pictures are stored."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.corpus.documents import Document, Reject, Slice
from pipelines.corpus.mmc4 import Mmc4Source
from pipelines.corpus.obelics import ObelicsSource
from pipelines.sequence import Modality
from tests.pipelines.reading import everything, only_reject, whole, write


def png(shade: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(sink, "PNG")
    return sink.getvalue()


def obelics(path: Path, **changes: object) -> ObelicsSource:
    return ObelicsSource.model_validate({"reader": "obelics", "name": "o", "path": str(path)} | changes)


def mmc4(path: Path, **changes: object) -> Mmc4Source:
    return Mmc4Source.model_validate({"reader": "mmc4", "name": "m", "path": str(path)} | changes)


def shape(document: Document | Reject) -> list[str | bytes]:
    """Texts as text, pictures as their bytes."""
    assert isinstance(document, Document), document
    return [span.text if span.modality is Modality.TEXT else span.data for span in document.spans]


def lines(*records: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# OBELICS

URLS = ["https://a.example/img/cat%201.png?width=300", "http://b.example/dog.jpg"]
PAGE: dict[str, Any] = {
    "images": [None, URLS[0], None, URLS[1]],
    "texts": ["A cat.\n\nIt sits.", None, "A dog.", None],
    "metadata": json.dumps([None, {"src": URLS[0], "alt_text": "cat"}, None, {"src": URLS[1]}]),
    "general_metadata": json.dumps({"url": "https://page.example", "warc_filename": "x.warc.gz"}),
}
EXPECTED = ["A cat.\n\nIt sits.", png(1), "A dog.", png(2)]


def test_a_page_of_urls_is_put_together_from_table_and_folder(tmp_path: Path) -> None:
    """The layout of the published shards, written by the library that wrote them."""
    media = write(tmp_path / "media", {"cat 1.png": png(1), "dog.jpg": png(2)})
    datasets.Dataset.from_list([PAGE] * 25).to_parquet(tmp_path / "train.parquet", batch_size=10)
    source = obelics(tmp_path / "train.parquet", media=str(media))
    (item,) = source.inputs()
    assert item.divisible
    pages = everything(source)
    assert [shape(page) for page in pages] == [EXPECTED] * 25
    assert [page.source for page in pages] == [f"o/train.parquet#{n}" for n in range(25)]
    assert isinstance(pages[0], Document)
    assert [span.uri for span in pages[0].spans[1::2]] == URLS
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 3
    halves = [Slice(input=item, start=0, stop=900), Slice(input=item, start=900, stop=item.size)]
    assert list(source.read(halves)) == pages


def test_a_page_of_bytes_needs_no_folder(tmp_path: Path) -> None:
    """Pictures as the library's own feature stores them."""
    features = datasets.Features(
        {"images": datasets.Sequence(datasets.Image()), "texts": datasets.Sequence(datasets.Value("string"))}
    )
    images = [None, {"bytes": png(1), "path": "cat.png"}, None, Image.fromarray(np.zeros((4, 4, 3), np.uint8))]
    page = {"images": images, "texts": PAGE["texts"]}
    datasets.Dataset.from_list([page], features=features).to_parquet(tmp_path / "x.parquet")
    (document,) = everything(obelics(tmp_path))
    text, cat, other, black = shape(document)
    assert (text, cat, other) == tuple(EXPECTED[:3])
    assert isinstance(black, bytes)
    assert Image.open(io.BytesIO(black)).size == (4, 4)
    assert isinstance(document, Document)
    assert document.spans[1].uri == "cat.png"


def test_lines_give_what_a_table_gives(tmp_path: Path) -> None:
    media = str(write(tmp_path / "media", {"cat 1.png": png(1), "dog.jpg": png(2)}))
    datasets.Dataset.from_list([PAGE]).to_parquet(tmp_path / "table/x.parquet")
    write(tmp_path, {"lines/x.jsonl": lines(PAGE)})
    (table,), (line,) = (everything(obelics(tmp_path / name, media=media)) for name in ("table", "lines"))
    assert isinstance(table, Document)
    assert isinstance(line, Document)
    assert table.content_hash == line.content_hash


def test_pictures_may_be_named_by_the_hash_of_their_url(tmp_path: Path) -> None:
    names = [
        f"{hashlib.sha256(url.encode()).hexdigest()}{ending}"
        for url, ending in zip(URLS, (".png", ".jpg"), strict=True)
    ]
    media = str(write(tmp_path / "media", {names[0]: png(1), names[1]: png(2)}))
    write(tmp_path, {"x.jsonl": lines(PAGE)})
    source = obelics(tmp_path / "x.jsonl", media=media, media_name="{sha256}{extension}")
    assert [shape(page) for page in everything(source)] == [EXPECTED]
    with pytest.raises(ValidationError, match=r"must be made of \{name\}, \{extension\} and \{sha256\}"):
        obelics(tmp_path, media_name="{url}.jpg")


def test_a_picture_that_is_missing_costs_its_document_or_only_itself(tmp_path: Path) -> None:
    media = str(write(tmp_path / "media", {"dog.jpg": png(2)}))
    write(tmp_path, {"x.jsonl": lines(PAGE, {"images": [URLS[0]], "texts": [None]})})
    rejects = everything(obelics(tmp_path / "x.jsonl", media=media))
    assert [r.reason for r in rejects if isinstance(r, Reject)] == ["media: missing"] * 2
    assert isinstance(rejects[0], Reject)
    assert f"{tmp_path}/x.jsonl: line at byte 0, place 1: {media}/cat 1.png: cannot be read" in rejects[0].error
    page, empty = everything(obelics(tmp_path / "x.jsonl", media=media, missing_media="skip"))
    assert shape(page) == ["A cat.\n\nIt sits.\nA dog.", png(2)]
    assert isinstance(empty, Reject)
    assert empty.reason == "document: empty"


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"images": [None]}, "obelics: unequal lists", "1 images and 4 texts"),
        ({"texts": [None] * 4}, "obelics: not one of two", "place 0: neither a picture nor a text"),
        ({"texts": ["a"] * 4}, "obelics: not one of two", "place 1: both a picture and a text"),
        ({"texts": ["a", None, 3, None]}, "field: wrong type", "place 2: field 'texts' holds a int"),
        ({"texts": ["\ud800", None, "b", None]}, "text: not Unicode", "surrogate"),
        ({"texts": "text"}, "field: wrong type", "'texts' is a str, expected list"),
        ({"images": [None, 7, None, URLS[1]]}, "field: wrong type", "place 1: the picture is a int"),
        ({"images": [None, {}, None, URLS[1]]}, "field: wrong type", "place 1: the picture is a dict without"),
        ({"images": [None, "../../secret.png", None, URLS[1]]}, "file: unsafe name", "secret.png"),
        ({"images": [None, "/etc/passwd", None, URLS[1]]}, "file: unsafe name", "/etc/passwd"),
        ({"images": [None, "http://x/%2e%2e%2fsecret.png", None, URLS[1]]}, "file: unsafe name", "../secret.png"),
        ({"images": [None, "http://x/", None, URLS[1]]}, "file: unsafe name", "''"),
        ({"images": [None, "http://[x/cat.png", None, URLS[1]]}, "media: not a URL", "place 1"),
        ({"images": [None, "big.png", None, URLS[1]]}, "file: too large", "max_file_mb"),
        ({"images": [None, "folder", None, URLS[1]]}, "file: unreadable", "folder"),
    ],
)
def test_a_page_that_is_none_is_rejected_with_its_place(
    change: dict[str, Any], reason: str, said: str, tmp_path: Path
) -> None:
    write(tmp_path / "media", {"dog.jpg": png(2), "big.png": bytes(2000), "folder/x": b""})
    write(tmp_path, {"secret.png": png(9), "x.jsonl": lines(PAGE | change)})
    settings = {"media": str(tmp_path / "media"), "missing_media": "skip", "max_file_mb": 0.001}
    reject = only_reject(obelics(tmp_path / "x.jsonl", **settings))
    assert (reject.source, reject.reason) == ("o/x.jsonl#0", reason)
    assert said in reject.error


def test_urls_without_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"x.jsonl": lines(PAGE)})
    reject = only_reject(obelics(tmp_path))
    assert reject.reason == "media: not in the record"
    assert "set `media`" in reject.error


# MMC4

SENTENCES = ["One.", "Two.", "Three.", "Four."]


def info(name: str, sentence: int, similarity: float) -> dict[str, Any]:
    return {
        "image_name": name,
        "raw_url": f"https://x.example/{name}",
        "matched_text_index": sentence,
        "matched_sim": similarity,
        "face_detections": None,
    }


def docs(count: int = 1) -> str:
    """Lines as in the published shards: two pictures of the third sentence, one of the first."""
    image_info = [info("a.png", 2, 0.31), info("b.png", 0, 0.22), info("c.png", 2, 0.27)]
    matrix = [[0.1, 0.1, 0.31, 0.0], [0.22, 0.1, 0.1, 0.0], [0.1, 0.1, 0.27, 0.0]]
    page = {
        "text_list": SENTENCES,
        "image_info": image_info,
        "similarity_matrix": matrix,
        "could_have_url_duplicate": 0,
    }
    return lines(*(page | {"url": f"https://page.example/{n}"} for n in range(count)))


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write(tmp_path / "images", {"a.png": png(1), "b.png": png(2), "c.png": png(3)}))


def zipped(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(path.name.removesuffix(".zip"), content)


def test_a_released_shard_is_read_from_its_zip(tmp_path: Path, images: str) -> None:
    zipped(tmp_path / "docs/docs_shard_17_v2.jsonl.zip", docs(3))
    source = mmc4(tmp_path / "docs", media=images, picture_place="before")
    pages = everything(source)
    assert [shape(page) for page in pages] == [[png(2), "One. Two.", png(1), png(3), "Three. Four."]] * 3
    assert isinstance(pages[0], Document)
    assert pages[0].source == "m/docs_shard_17_v2.jsonl.zip#0"
    assert pages[0].spans[0].uri == "https://x.example/b.png"


def test_pictures_stand_after_their_sentences_where_so_set(tmp_path: Path, images: str) -> None:
    write(tmp_path, {"x.jsonl": docs()})
    (page,) = everything(mmc4(tmp_path / "x.jsonl", media=images, picture_place="after"))
    assert shape(page) == ["One.", png(2), "Two. Three.", png(1), png(3), "Four."]


def test_a_drawn_place_follows_from_the_document_alone(tmp_path: Path, images: str) -> None:
    write(tmp_path, {"x.jsonl": docs(60)})
    source = mmc4(tmp_path / "x.jsonl", media=images)
    pages = everything(source)
    first = [shape(page)[0] == png(2) for page in pages]
    assert 15 < sum(first) < 45
    (item,) = whole(source.inputs())
    late = list(source.read([Slice(input=item.input, start=item.stop // 2, stop=item.stop)]))
    assert late == pages[-len(late) :]
    other = everything(mmc4(tmp_path / "x.jsonl", media=images, seed=1))
    assert [shape(page)[0] == png(2) for page in other] != first


def test_pictures_that_match_too_little_are_left_out(tmp_path: Path, images: str) -> None:
    write(tmp_path, {"x.jsonl": docs()})
    settings = {"media": images, "picture_place": "before"}
    (page,) = everything(mmc4(tmp_path / "x.jsonl", min_similarity=0.3, **settings))
    assert shape(page) == ["One. Two.", png(1), "Three. Four."]
    (bare,) = everything(mmc4(tmp_path / "x.jsonl", min_similarity=0.9, **settings))
    assert shape(bare) == ["One. Two. Three. Four."]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"image_info": [info("a.png", 4, 0.3)]}, "mmc4: no such sentence", "matched_text_index 4 of 4 sentences"),
        ({"image_info": [info("a.png", -1, 0.3)]}, "mmc4: no such sentence", "picture 0: matched_text_index -1"),
        ({"image_info": [info("a.png", 1, 0.3) | {"matched_sim": None}]}, "field: wrong type", "matched_sim"),
        ({"image_info": [{"image_name": "a.png", "matched_sim": 1}]}, "field: missing", "'matched_text_index'"),
        ({"image_info": [info("a.png", 1, 0.3) | {"image_name": None}]}, "field: wrong type", "image_name"),
        ({"image_info": [info("../x.png", 1, 0.3)]}, "file: unsafe name", "picture 0"),
        ({"image_info": [info("z.png", 1, 0.3)]}, "media: missing", "z.png"),
        ({"image_info": ["a.png"]}, "field: wrong type", "picture 0: a str"),
        ({"image_info": None}, "field: wrong type", "'image_info' is a NoneType"),
        ({"text_list": []}, "mmc4: no such sentence", "of 0 sentences"),
        ({"text_list": [], "image_info": []}, "document: empty", "no sentence and no picture"),
    ],
)
def test_a_bad_record_is_rejected_and_the_rest_goes_on(
    change: dict[str, Any], reason: str, said: str, tmp_path: Path, images: str
) -> None:
    write(tmp_path, {"x.jsonl": lines(json.loads(docs()) | change) + docs()})
    reject, page = everything(mmc4(tmp_path / "x.jsonl", media=images, min_similarity=0.1))
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert said in reject.error
    assert f"{tmp_path}/x.jsonl: line at byte 0" in reject.error
    assert isinstance(page, Document)
