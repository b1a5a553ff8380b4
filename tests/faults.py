"""An S3 server that misbehaves by plan: moto behind a proxy of our own, in a process of their own.

    python -m tests.faults      prints the endpoint's URL and runs until its standard input ends

Enters: a `FaultPlan`, to be changed at any time. Leaves: an endpoint that answers 500 and 503, resets and delays
connections and cuts bodies short, before the server has seen the request or after. Always holds: whether a request goes
wrong follows from the plan's seed, the request, and how often it was sent; the kinds of faults take turns, so that each
comes; and a conditional PUT is atomic, as S3's is (moto looks first and writes then). A process of its own, because
deltalake waits for some answers with Python's lock held.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BEFORE = ("500", "503", "reset", "delay")
"""The server does not see the request."""

AFTER = ("500 after", "reset after")
"""The server does its work, and its answer is lost."""

BODY = ("reset in body", "truncate")
"""Half of the answer's body comes: then a reset, or the end of the connection."""

KINDS = (*BEFORE, *AFTER, *BODY)
"""Further kinds: `short` announces half of a body and sends that; `403` refuses."""

_ERRORS = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}

_OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect", "content-length"}


@dataclass(kw_only=True)
class FaultPlan:
    """Which requests go wrong, and how."""

    seed: int = 0
    rate: float = 0.0
    """Share of the requests."""
    kinds: tuple[str, ...] = KINDS
    delay_s: float = 3.0
    only: str = ""
    """A pattern to be found in `METHOD /bucket/key?query`; other requests are left alone."""
    first: int = 0
    """Only so many of the times that a request is sent, the first ones; 0: all."""
    ignore_conditions: bool = False
    """Be one of the stores that overwrite whatever a conditional PUT says."""

    def hits(self, method: str, path: str, headers: Mapping[str, str], attempt: int) -> bool:
        """Whether a request goes wrong at its n-th attempt."""
        if not re.search(self.only, f"{method} {path}") or (self.first and attempt > self.first):
            return False
        words = f"{self.seed}\n{method}\n{path}\n{headers.get('Range')}\n{attempt}"
        number = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")
        return number / 2**64 < self.rate


class FaultyS3:
    """The other end: what a test says to the server's process."""

    def __init__(self, url: str) -> None:
        self.url = url
        """The endpoint for `AWS_ENDPOINT_URL`."""
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_MAX_ATTEMPTS": "2",
            "BRAID_STORE_TIMEOUT_S": "2",
        }

    def plan(self, **settings: Any) -> None:
        """Let requests meet other faults from now on, and forget those before; without settings, none."""
        self._ask("PUT", "/_plan", json.dumps(settings).encode())

    def down(self) -> None:
        """Refuse all requests, for good."""
        self.plan(rate=1.0, kinds=["503"])

    def log(self) -> list[tuple[str, str]]:
        """`METHOD path` and fault of each request since the plan was made."""
        return [(request, fault) for request, fault, _ in json.loads(self._ask("GET", "/_log"))]

    def sent(self) -> list[tuple[str, int]]:
        """`METHOD path` and bytes of body of each request since the plan was made."""
        return [(request, size) for request, _, size in json.loads(self._ask("GET", "/_log"))]

    def fill(self, prefix: str, count: int) -> None:
        """Put many empty objects into the bucket."""
        self._ask("PUT", "/_fill", json.dumps([prefix, count]).encode())

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        connection.request(method, path, body)
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status == 200, data
        connection.close()
        return data


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    """A fresh S3 with one bucket, `bucket`."""
    command = [sys.executable, "-m", "tests.faults"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield FaultyS3(process.stdout.readline().strip())
        finally:
            process.stdin.close()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = FaultPlan()
        self.log: list[tuple[str, str, int]] = []
        self._server = server
        self._attempts: Counter[tuple[str, ...]] = Counter()
        self._faults = 0
        self._keys: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are nothing to report."""

    def control(self, path: str, body: bytes) -> Any:
        with self._lock:
            if path == "/_plan":
                self.plan = FaultPlan(**json.loads(body))
                self.log.clear()
                self._attempts.clear()
                self._faults = 0
            elif path == "/_fill":
                from moto.s3.models import s3_backends

                prefix, count = json.loads(body)
                for number in range(count):
                    s3_backends["123456789012"]["aws"].put_object("bucket", f"{prefix}{number:07}", b"")
            return self.log

    def fault(self, method: str, path: str, headers: Mapping[str, str], size: int) -> str:
        """Count a request and say what it meets."""
        with self._lock:
            request = method, path, str(headers.get("Range"))
            self._attempts[request] += 1
            hit = self.plan.hits(method, path, headers, self._attempts[request])
            kind = self.plan.kinds[self._faults % len(self.plan.kinds)] if hit else ""
            self._faults += hit
            self.log.append((f"{method} {path}", kind, size))
            return kind

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        """The server's own answer: status, headers, body."""
        conditional = {k.lower(): v for k, v in headers.items()}.get("if-none-match") == "*"
        if conditional and self.plan.ignore_conditions:
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        with self._lock:
            lock = self._keys[path] if conditional else threading.Lock()
        with lock:
            connection = http.client.HTTPConnection(self._server, timeout=60)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self._body()
        if self.path.startswith("/_"):
            return self._answer(200, [], json.dumps(self.server.control(self.path, body)).encode())
        kind = self.server.fault(self.command, self.path, self.headers, len(body))  # type: ignore[arg-type]
        if kind == "delay":
            time.sleep(self.server.plan.delay_s)
        if kind in ("reset", "delay"):
            return self._reset()
        if kind in _ERRORS:
            return self._refuse(kind)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _OWN_HEADERS}
        status, answered, answer = self.server.forward(self.command, self.path, headers, body)
        if kind == "500 after":
            return self._refuse("500")
        if kind == "reset after":
            return self._reset()
        return self._answer(status, answered, answer, kind if len(answer) > 1 else "")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                # A client that gave up meanwhile: S3 would not store the part of a body that came.
                raise ConnectionAbortedError(f"{len(body)} of {length} bytes came")
            return body
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, kind: str = "") -> None:
        sent = body[: len(body) // 2] if kind else body
        length = str(len(sent if kind == "short" else body))
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(sent)
        self.wfile.flush()
        if kind == "reset in body":
            self._reset()
        elif kind == "truncate":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _refuse(self, kind: str) -> None:
        xml = f"<?xml version='1.0'?><Error><Code>{_ERRORS[kind]}</Code><Message>by plan</Message></Error>"
        self._answer(int(kind), [("Content-Type", "application/xml")], xml.encode())

    def _reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        # The handler's files hold the socket open until they are closed too.
        self.rfile.close()
        self.wfile.close()
        self.connection.close()


def _main() -> None:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    proxy = _Proxy(f"{host}:{port}")
    assert proxy.forward("PUT", "/bucket", {}, b"")[0] == 200
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{proxy.server_address[1]}", flush=True)
    sys.stdin.read()
    proxy.shutdown()
    moto.stop()


if __name__ == "__main__":
    _main()
