"""The few HTTP calls of the command line: one JSON document, or one stream of server-sent events."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import USAGE, CliError

MAX_DOCUMENT_BYTES = 64 << 20
MAX_LINE_BYTES = 1 << 20


class Server:
    """A running cluster, by the URL of its gateway. Every call raises CliError with a hint when it fails."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CliError(f"--url: {url!r} is not an http URL", "for example --url http://127.0.0.1:8000", USAGE)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key or os.environ.get("PENSTOCK_API_KEY")

    def get(self, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON document at `path`."""
        with self._open(path, None, timeout_s) as response:
            return _document(response.read(MAX_DOCUMENT_BYTES), self.url + path)

    def post(self, path: str, body: object, timeout_s: float = 10.0) -> Any:
        """The JSON document that answers `body`."""
        with self._open(path, body, timeout_s) as response:
            return _document(response.read(MAX_DOCUMENT_BYTES), self.url + path)

    @contextmanager
    def stream(self, path: str, body: object, timeout_s: float = 600.0) -> Iterator[Iterator[Any]]:
        """POST `body`; the events of the answer as they arrive. Leaving early closes the connection, which cancels."""
        with self._open(path, body, timeout_s) as response:
            yield (_document(data, self.url + path) for data in _event_data(_lines(response)))

    def _open(self, path: str, body: object | None, timeout_s: float) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self._api_key:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as err:
            with err:
                raise _refusal(err, self.url) from err
        except (OSError, http.client.HTTPException) as err:
            reason = getattr(err, "reason", err)
            raise CliError(
                f"no answer from {self.url}: {reason}", "start a cluster with `penstock serve`, or give --url"
            ) from err
        return response


def _refusal(err: urllib.error.HTTPError, url: str) -> CliError:
    hint = {
        401: "give the key with --api-key or $PENSTOCK_API_KEY",
        404: "is this a Penstock gateway? check --url",
        503: "`penstock status` shows what the workers do",
    }.get(err.code, "")
    try:
        message = json.loads(err.read(1 << 20))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        message = err.reason
    return CliError(f"{url} answered {err.code}: {message}", hint)


def _document(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as err:
        raise CliError(f"{url} did not answer with JSON", "is this a Penstock gateway? check --url") from err


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while line := response.readline(MAX_LINE_BYTES):
            yield line
    except (OSError, http.client.HTTPException) as err:
        raise CliError(f"the connection broke: {err}", "`penstock status` shows what the workers do") from err


def _event_data(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event up to `[DONE]`; comments (pings) and other fields are skipped."""
    data: list[bytes] = []
    for line in lines:
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif not line and data:
            joined, data = b"\n".join(data), []
            if joined == b"[DONE]":
                return
            yield joined
