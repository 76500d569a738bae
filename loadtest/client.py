"""Sends one request and reads its stream. With `target.py` all that speaks HTTP here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
import msgspec

from ..core.clock import Clock
from .answers import MAX_DETAIL, AnswerReader, kind_of_status
from .record import Asked, ErrorKind, Failure, Record
from .sse import EventReader, EventTooLarge

KEEP_ALIVE_S = 4.0  # below the 5 s of common servers: a connection that the server closes just now is an error
READ_BUFFER_BYTES = 1 << 20  # the library's 64 KiB throttles long bodies
MAX_REFUSAL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Call:
    """A request ready to be sent: its bytes are made before its time comes."""

    asked: Asked
    path: str
    body: bytes


class Client:
    """One server. Use as an async context manager. With `unix_path` it is reached by a Unix socket."""

    def __init__(
        self,
        url: str,
        clock: Clock,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        unix_path: str | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.num_running = 0
        self.peak_running = 0
        self._running: set[asyncio.Timeout] = set()
        self._is_giving_up = False
        self._clock, self._timeout_s, self._unix_path = clock, timeout_s, unix_path
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # No limit on connections: one would hold requests back in the client and call it the server's latency.
        path, keep_s = self._unix_path, KEEP_ALIVE_S
        connections = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_s)
            if path is None
            else aiohttp.UnixConnector(path, limit=0, keepalive_timeout=keep_s)
        )
        self._http = aiohttp.ClientSession(
            connector=connections,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=READ_BUFFER_BYTES,
            auto_decompress=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._http is not None
        return self._http

    async def send(
        self, call: Call, start_s: float, on_tokens: Callable[[Record], None] | None = None
    ) -> tuple[Record, str]:
        """The record and the answer's text. Never raises for what the server or the network does."""
        record = Record(call.asked)
        reader = AnswerReader(record)
        self.num_running += 1
        self.peak_running = max(self.peak_running, self.num_running)
        try:
            async with asyncio.timeout(self._timeout_s) as timeout:
                self._running.add(timeout)
                try:
                    await self._stream(call, record, reader, start_s, on_tokens)
                finally:
                    self._running.discard(timeout)
        except TimeoutError:
            record.failure = record.failure or self._why_ended()
        except (aiohttp.ClientError, OSError, EventTooLarge) as err:
            kind = ErrorKind.CONNECTION if not record.has_begun else ErrorKind.BROKEN_STREAM
            record.failure = record.failure or Failure(kind, f"{type(err).__name__}: {err}"[:MAX_DETAIL])
        finally:
            self.num_running -= 1
            record.end_s = self._clock.now() - start_s
        return record, reader.text

    def begin(self) -> None:
        """A new run: nothing is given up any more."""
        self._is_giving_up = False

    def give_up(self) -> None:
        """End all requests under way; their records say so."""
        self._is_giving_up = True
        for timeout in list(self._running):
            timeout.reschedule(asyncio.get_running_loop().time())

    def _why_ended(self) -> Failure:
        if self._is_giving_up:
            return Failure(ErrorKind.GIVEN_UP, "what was known of the run was enough")
        return Failure(ErrorKind.TIMEOUT, f"no end after {self._timeout_s:g} s")

    async def _stream(
        self,
        call: Call,
        record: Record,
        reader: AnswerReader,
        start_s: float,
        on_tokens: Callable[[Record], None] | None,
    ) -> None:
        record.sent_s = self._clock.now() - start_s
        async with self.http.post(self.url + call.path, data=call.body) as response:
            record.has_begun = True
            if response.status != 200:
                record.failure = Failure(kind_of_status(response.status), await _refusal(response), response.status)
                return
            events = EventReader()
            async for piece in response.content.iter_any():
                now_s = self._clock.now() - start_s
                for data in events.feed(piece):
                    reader.read(data, now_s)
                if on_tokens is not None:
                    on_tokens(record)
            reader.end()


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """What the server says is wrong, in one line."""
    raw = await response.content.read(MAX_REFUSAL_BYTES)
    try:
        document = msgspec.json.decode(raw)
        error = document.get("error", document) if isinstance(document, dict) else document
        said = error.get("message", error) if isinstance(error, dict) else error
    except msgspec.MsgspecError:
        said = raw.decode(errors="replace")
    return " ".join(str(said).split())[:MAX_DETAIL]
