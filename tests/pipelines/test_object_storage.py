"""Corpora in an object store: read as from a disk, through whatever the network does."""

import errno
import gzip
import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipelines.corpus import remote
from pipelines.corpus.documents import Document, Reject, Slice
from pipelines.corpus.errors import CorpusError, StoreError, TransientError
from pipelines.corpus.files import find_files, open_part, stamp
from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.corpus.reader import Reader
from pipelines.corpus.sources import Source
from tests.faults import KINDS, FaultyS3
from tests.pipelines.stores import copy, object_store, put
from tests.pipelines.tiny import write_corpus


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyS3]:
    with object_store() as server, pytest.MonkeyPatch.context() as patch:
        # One request a try, and hardly a pause: these tests count on many faults.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
        yield server


@pytest.fixture
def s3(server: FaultyS3) -> FaultyS3:
    server.plan()
    return server


def rows(reader: Reader) -> list[Document | Reject]:
    return list(reader.read([Slice(input=item, start=0, stop=item.size) for item in reader.inputs()]))


def test_a_corpus_that_moves_from_disk_to_a_store_keeps_its_rows(tmp_path: Path, s3: FaultyS3) -> None:
    write_corpus(tmp_path / "raw", stamps=4, lines=9)
    copy(tmp_path / "raw", "s3://bucket/moved")
    for where in (MediaFolderSource, JsonLinesSource):
        name = "stamps" if where is MediaFolderSource else "lines.jsonl"
        reader = "media_folder" if where is MediaFolderSource else "jsonl"
        local, moved = (
            where.model_validate({"name": "a", "reader": reader, "path": f"{root}/{name}"})
            for root in (tmp_path / "raw", "s3://bucket/moved")
        )
        assert [(i.uri, i.size) for i in local.inputs()] == [(i.uri, i.size) for i in moved.inputs()]
        assert not {i.etag for i in local.inputs()} & {i.etag for i in moved.inputs()}
        documents = [[r for r in rows(source) if isinstance(r, Document)] for source in (local, moved)]
        assert [(d.row_id, d.content_hash) for d in documents[0]] == [(d.row_id, d.content_hash) for d in documents[1]]
        assert len(documents[0]) == (4 if where is MediaFolderSource else 9)


# What sorts around the slash, so that an order by whole paths and one folder by folder could differ.
_NAMES = st.sampled_from(["a", "a-b", "a.b", "a b", "é", "b.png", ".hidden", "a+%20#?", "B"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paths=st.sets(st.lists(_NAMES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=8),
    glob=st.sampled_from(["**", "*", "a*/**", "**/b.png", "a/*", "?/**"]),
)
def test_a_store_is_listed_in_the_order_and_by_the_globs_of_a_disk(
    paths: set[tuple[str, ...]], glob: str, s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    uri = f"s3://bucket/{folder.name}"
    for path in paths:
        # On a disk a name is a file or a folder.
        if not any(path != other and path == other[: len(path)] for other in paths):
            file = folder.joinpath(*path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * len(path))
    copy(folder, uri)
    put(f"{uri}/zz.b.png", b"")
    (folder / "zz.b.png").touch()

    def found(root: str) -> list[tuple[str, int]]:
        files = list(find_files(root, "s", ("",), glob=glob, key=lambda name: name.partition(".")[0]))
        assert all(open_part(file.part).read() == open_part(f"{folder}/{file.uri}").read() for file in files)
        return [(file.uri, stamp([file])[0]) for file in files]

    try:
        expected = found(str(folder))
    except CorpusError:
        with pytest.raises(CorpusError, match="nothing to read"):
            found(uri)
    else:
        assert found(uri) == expected
        whole = list(find_files(f"{uri}/{glob}", "s", ()))
        assert [f.uri for f in whole] == [f.uri for f in find_files(f"{folder}/{glob}", "s", ())]


def test_a_listing_asks_for_a_thousand_objects_at_once_and_for_none_alone(s3: FaultyS3) -> None:
    s3.fill("many/", 2500)
    s3.plan()
    files = list(find_files("s3://bucket/many", "s", ("",)))
    assert len({stamp([file]) for file in files}) == 2500
    requests = [request for request, _ in s3.log()]
    assert not any("many/0" in request.partition("?")[0] for request in requests)
    # Three for the objects, the others to see that a folder is there.
    assert len(requests) <= 7


@pytest.mark.parametrize("kind", [*KINDS, "short"])
def test_reads_give_the_true_bytes_through_every_kind_of_fault(kind: str, s3: FaultyS3) -> None:
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, 3_000_000, np.uint8).tobytes().replace(b"\xa5\n", b"\xa5\xa5\n")
    part = put(f"s3://bucket/reads/{kind}", data)
    s3.plan(rate=0.3, kinds=[kind], delay_s=2.5, seed=3)
    with open_part(part) as file, io.BytesIO(data) as true:
        for _ in range(6 if kind == "delay" else 40):
            place, size = int(rng.integers(len(data) + 9)), int(rng.choice([1, 7, 3000, 200_000, 5_000_000]))
            assert file.seek(place) == true.seek(place)
            assert file.read(size) == true.read(size)
            assert file.readline() == true.readline()
            assert file.tell() == true.tell()
    assert any(fault == kind for _, fault in s3.log())


def test_what_a_store_s_trouble_interrupts_is_no_damaged_table(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reads the file through this project's own: its error must come out as what it is."""
    monkeypatch.setattr(remote, "TRIES", 2)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": range(500_000)}), sink, row_group_size=50_000)
    table = pq.ParquetFile(open_part(put("s3://bucket/t.parquet", sink.getvalue().to_pybytes())))
    s3.down()
    with pytest.raises(TransientError, match=r"t.parquet: failed 2 times within .* AWS Error"):
        table.read_row_group(0)


def test_a_store_that_is_down_ends_in_a_clear_error_and_not_in_quarantine(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TRIES", 3)
    put("s3://bucket/down/a.txt", b"a fox")
    source = MediaFolderSource(name="s", reader="media_folder", path="s3://bucket/down")
    (item,) = source.inputs()
    s3.down()
    began = time.monotonic()
    with pytest.raises(
        TransientError, match=r"s3://bucket/down/a.txt: failed 3 times .* nothing is wrong with the data"
    ):
        list(source.read([Slice(input=item, start=0, stop=5)]))
    with pytest.raises(TransientError, match="s3://bucket/down: failed 3 times"):
        list(source.inputs())
    assert time.monotonic() - began < 30


def test_one_object_that_is_gone_or_refused_goes_to_quarantine_with_the_true_reason(s3: FaultyS3) -> None:
    for name in ("gone", "secret", "well"):
        put(f"s3://bucket/some/{name}.txt", b"a fox")
    source = MediaFolderSource(name="s", reader="media_folder", path="s3://bucket/some")
    slices = [Slice(input=item, start=0, stop=5) for item in source.inputs()]
    filesystem, path = remote.file_system("s3://bucket/some/gone.txt")
    filesystem.delete_file(path)
    s3.plan(rate=1.0, kinds=["403"], only="secret")
    gone, secret, well = source.read(slices)
    assert isinstance(well, Document)
    for row, why in ((gone, "no such object"), (secret, "the store refuses")):
        assert isinstance(row, Reject)
        assert row.reason == "file: unreadable"
        assert why in row.error


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.tar"])
def test_a_file_that_is_refused_while_it_is_read_is_no_damaged_one(name: str, s3: FaultyS3) -> None:
    """A store is first asked how long an object is."""
    put(f"s3://bucket/later/{name}", gzip.compress(b"a fox") * 9000)
    reader = {"parquet": "parquet", "tar": "webdataset"}.get(name.rpartition(".")[2], "jsonl")
    settings = {"text_field": "text"} if reader == "parquet" else {}
    source: Reader = TypeAdapter(Source).validate_python(
        {"name": "s", "reader": reader, "path": f"s3://bucket/later/{name}", **settings}
    )
    slices = [Slice(input=item, start=0, stop=item.size) for item in source.inputs()]
    s3.plan(rate=1.0, kinds=["403"], only=f"GET .*{name}$")
    (row,) = source.read(slices)
    assert isinstance(row, Reject)
    assert row.reason == "file: unreadable"
    assert "the store refuses" in row.error


def test_an_object_that_shrinks_while_it_is_read_is_never_filled_up(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TRIES", 2)
    part = put("s3://bucket/shrinks", b"\xa5" * 3_000_000)
    file = open_part(part)
    assert file.read(10) == b"\xa5" * 10
    put(part, b"\xa5" * 2_000_000)
    with pytest.raises(TransientError, match="s3://bucket/shrinks"):
        file.read()


def test_a_missing_bucket_or_folder_or_kind_of_store_is_named(s3: FaultyS3) -> None:
    for uri in ("s3://nobucket/x", "s3://bucket/nowhere", "s3://bucket/nowhere/*.txt"):
        with pytest.raises(CorpusError, match=r"source s: s3://\w+/\w+ does not exist"):
            list(find_files(uri, "s", (".txt",)))
    with pytest.raises(StoreError, match="hdfs:// is not known; name a local path, s3://BUCKET"):
        list(find_files("hdfs://namenode/x", "s", (".txt",)))


def test_a_network_file_system_s_fault_passes_and_a_missing_file_does_not(tmp_path: Path) -> None:
    """/proc/self/mem has no page at 0: reading it is a true EIO of the kernel."""
    with open_part("/proc/self/mem") as file, pytest.raises(TransientError, match="/proc/self/mem: Input/output error"):
        file.read(10)
    with pytest.raises(FileNotFoundError) as error:
        open_part(str(tmp_path / "nothing"))
    assert error.value.errno == errno.ENOENT


def test_google_s_uris_are_taken_apart_as_amazon_s() -> None:
    filesystem, path = remote.file_system("gs://corpora/a b/é#1.txt")
    assert (filesystem.type_name, path) == ("gcs", "corpora/a b/é#1.txt")
    assert remote.is_remote("gs://corpora/a")
