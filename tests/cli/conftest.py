"""A tiny HTTP server with prepared answers, for the commands that talk to a gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, str, bytes]  # status, content type, body


class CannedServer(ThreadingHTTPServer):
    """`answers` by path; `seen` collects (path, headers, body) of each request."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.seen: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: CannedServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.seen.append((self.path, dict(self.headers), body))
        status, kind, data = self.server.answers.get(self.path, (404, "text/plain", b"nothing here"))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return


def json_answer(document: object, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(document).encode()


def sse_answer(*events: object) -> Answer:
    lines = [b": ping\n\n", *(f"data: {json.dumps(event)}\n\n".encode() for event in events), b"data: [DONE]\n\n"]
    return 200, "text/event-stream", b"".join(lines)


@contextmanager
def canned_server(answers: dict[str, Answer]) -> Iterator[CannedServer]:
    with CannedServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Canned:
    """What the tests need of all this, as one fixture: conftest modules cannot be imported."""

    json = staticmethod(json_answer)
    sse = staticmethod(sse_answer)
    server = staticmethod(canned_server)


@pytest.fixture
def canned() -> type[Canned]:
    return Canned
