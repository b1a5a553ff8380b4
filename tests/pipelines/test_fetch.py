"""Fetching from a real HTTP server, one that breaks off, stalls and lies too."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipelines.tokenizers import fetch as module
from pipelines.tokenizers.fetch import KNOWN, FetchError, Known, fetch

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at any path but /missing; what goes wrong is set before."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.break_after: list[int] = []
        """Bytes of the body after which answers break off, one entry an answer."""
        self.errors: list[int] = []
        """Status codes of the first answers."""
        self.stall = threading.Event()
        self.stall.set()
        self.shift = 0
        """By how much an answer to a range begins too late."""
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/encodec.th?dl=1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if not self.server.stall.wait(timeout=30):
            return None
        if self.path == "/missing":
            return self.send_error(404)
        if self.server.errors:
            return self.send_error(self.server.errors.pop(0))
        content = self.server.content
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        begin = start + (self.server.shift if start else 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        stop = begin + self.server.break_after.pop(0) if self.server.break_after else None
        self.wfile.write(content[begin:stop])
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: Server, out: Path, **options: object) -> Path:
    settings: dict[str, object] = {"sha256": SHA256, "pause_s": 0.0, "timeout_s": 5.0, **options}
    return fetch(server.url, out, **settings)  # type: ignore[arg-type]


def assert_whole(path: Path, out: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert [file.name for file in out.iterdir()] == [path.name]


def test_a_file_arrives_under_its_name_and_progress_is_told(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = get(server, tmp_path / "new", watch=lambda done, total: told.append((done, total)))
    assert path == tmp_path / "new" / "encodec.th"
    assert_whole(path, tmp_path / "new")
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(told) == told


def test_a_file_that_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    assert_whole(get(server, tmp_path), tmp_path)
    assert len(server.asked) == 1
    (tmp_path / "encodec.th").write_bytes(b"another")
    with pytest.raises(FetchError, match=r"encodec\.th is there already, but its sha256 is \w{64}, and"):
        get(server, tmp_path)
    assert (tmp_path / "encodec.th").read_bytes() == b"another"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges, server.break_after = ranges, [1_000_000, 500_000, 0]
    assert_whole(get(server, tmp_path), tmp_path)
    expected = [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500000-"]
    # Without ranges every answer begins anew: the second left half a megabyte, the third nothing.
    assert server.asked == (expected if ranges else [None, "bytes=1000000-", "bytes=500000-", None])


def test_attempts_are_bounded_and_a_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    server.break_after = [700_000, 0, 0, 0]
    with pytest.raises(FetchError, match=r"gave up after 3 attempt.*ended after 700,000 of 3,000,000 bytes.* goes on"):
        get(server, tmp_path, attempts=3)
    assert [file.name for file in tmp_path.iterdir()] == ["encodec.th.part"]
    assert len(server.asked) == 3
    server.break_after = []
    assert_whole(get(server, tmp_path), tmp_path)
    assert server.asked[3] == "bytes=700000-"


def test_another_content_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>please log in</html>"
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(FetchError, match=rf"thrown away, for its sha256 is {found}, and {SHA256} is"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_rest_of_an_older_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "encodec.th.part").write_bytes(b"x" * 1000)
    assert_whole(get(server, tmp_path), tmp_path)
    (tmp_path / "encodec.th").unlink()
    (tmp_path / "encodec.th.part").write_bytes(CONTENT + b"too long")
    assert_whole(get(server, tmp_path), tmp_path)
    (tmp_path / "encodec.th").rename(tmp_path / "encodec.th.part")
    asked = len(server.asked)
    assert_whole(get(server, tmp_path), tmp_path)
    assert server.asked[asked:] == [f"bytes={len(CONTENT)}-"]


def test_a_server_that_sends_another_range_is_refused(server: Server, tmp_path: Path) -> None:
    server.shift = 10
    (tmp_path / "encodec.th.part").write_bytes(CONTENT[:1000])
    with pytest.raises(FetchError, match="asked for the bytes from 1000, the server sent others"):
        get(server, tmp_path)


def test_what_is_not_there_ends_at_once_and_what_is_busy_is_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="the server answered 404 Not Found; check the address"):
        fetch(f"http://127.0.0.1:{server.server_port}/missing", tmp_path, sha256=SHA256)
    server.errors = [403]
    with pytest.raises(FetchError, match="answered 403"):
        get(server, tmp_path)
    assert len(server.asked) == 2
    server.errors = [503, 429, 500]
    assert_whole(get(server, tmp_path), tmp_path)
    assert len(server.asked) == 6


def test_a_silent_server_is_left_after_the_timeout(server: Server, tmp_path: Path) -> None:
    server.stall.clear()
    with pytest.raises(FetchError, match=r"gave up after 2 attempt\(s\): no answer within 0\.2 s"):
        get(server, tmp_path, timeout_s=0.2, attempts=2)
    assert len(server.asked) == 2


def test_a_server_that_is_not_there_is_named(server: Server, tmp_path: Path) -> None:
    other = Server()
    url = other.url
    other.server_close()
    with pytest.raises(FetchError, match=r"gave up after 2 attempt\(s\): .*refused"):
        fetch(url, tmp_path, sha256=SHA256, attempts=2, pause_s=0.0)


def test_a_local_file_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "with space.th"
    source.write_bytes(CONTENT)
    out = tmp_path / "out"
    assert_whole(fetch(source.as_uri(), out, sha256=SHA256.upper()), out)
    assert (out / "with space.th").exists()
    with pytest.raises(FetchError, match=r"missing\.th: cannot be read: .*No such file"):
        fetch((tmp_path / "missing.th").as_uri(), out, sha256=SHA256)


def test_a_known_name_is_checked_by_the_digits_that_are_known(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.KNOWN, "tiny", Known(url=server.url, sha256=SHA256[:8]))
    for given in ("", SHA256[:8], SHA256[:20], SHA256):
        assert_whole(fetch("tiny", tmp_path / f"out{len(given)}", sha256=given), tmp_path / f"out{len(given)}")
    for given in ("0" * 8, SHA256[:4], SHA256[:8] + "x"):
        with pytest.raises(FetchError, match="--sha256"):
            fetch("tiny", tmp_path / "no", sha256=given)
    monkeypatch.setitem(module.KNOWN, "tiny", Known(url=server.url, sha256="00000000"))
    with pytest.raises(FetchError, match=r"and 00000000\.\.\. is wanted"):
        fetch("tiny", tmp_path / "no")


def test_the_known_names_state_the_digits_of_their_file_names() -> None:
    for known in KNOWN.values():
        assert known.url.rpartition("-")[2] == f"{known.sha256}.th"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("http://x.org/a.th", {}, "--sha256 has 0 of 64 digits"),
        ("http://x.org/a.th", {"sha256": "ab" * 4}, "--sha256 has 8 of 64 digits"),
        ("http://x.org/a.th", {"sha256": "g" * 64}, "is no sha256"),
        ("http://x.org/", {"sha256": "a" * 64}, "say so with --name"),
        ("http://x.org/a.th", {"sha256": "a" * 64, "name": "../b"}, "say so with --name"),
        ("ftp://x.org/a.th", {"sha256": "a" * 64}, "no address that can be fetched"),
        ("encodec_25khz", {"sha256": "a" * 64}, "known name: encodec_24khz, encodec_48khz"),
    ],
)
def test_faulty_arguments_are_refused_before_anything_is_asked(
    source: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FetchError, match=message):
        fetch(source, tmp_path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
