"""Server-sent events to one client, written without ever waiting long for it.

The response starts with the first event (or the first ping), so a failure before any token still has its own HTTP
status. A client that takes nothing for `write_timeout_s` while its buffer is full is cut; what is buffered for it is
bounded by the transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from .metrics import GatewayMetrics

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
FREE_WRITE_BYTES = 16 << 10  # with less than this buffered a write cannot block: the transport pauses at 64 KiB

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class SseWriter:
    """One event stream. Raises ConnectionError when the client is gone or was cut."""

    def __init__(
        self,
        request: web.Request,
        headers: dict[str, str],
        ping_interval_s: float,
        write_timeout_s: float,
        metrics: GatewayMetrics,
    ) -> None:
        self.response = web.StreamResponse(headers=HEADERS | headers)
        self._request = request
        self._ping_interval_s = ping_interval_s
        self._write_timeout_s = write_timeout_s
        self._metrics = metrics
        self._starting = asyncio.Lock()
        self._written_at = asyncio.get_running_loop().time()

    @property
    def is_started(self) -> bool:
        return self.response.prepared

    async def send(self, data: bytes) -> None:
        """One JSON document as one event."""
        await self.write(b"data: " + data + b"\n\n")

    async def write(self, frame: bytes) -> None:
        if not self.response.prepared:
            await self._start()
        self._written_at = asyncio.get_running_loop().time()
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if len(frame) < FREE_WRITE_BYTES and transport.get_write_buffer_size() < FREE_WRITE_BYTES:
            await self.response.write(frame)
            return
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self.response.write(frame)
        except TimeoutError:
            self._metrics.cut_slow_client()
            transport.abort()
            raise ConnectionResetError("the client reads too slowly") from None

    async def close(self, keep_alive: bool = True) -> None:
        """End of the stream; without keep_alive the connection ends too."""
        if not keep_alive:
            self.response.force_close()
        await self.response.write_eof()

    @asynccontextmanager
    async def pinging(self) -> AsyncIterator[None]:
        """Send a comment after each silent interval: a long prefill outlives the read timeouts of proxies."""
        task = asyncio.create_task(self._ping())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _start(self) -> None:
        async with self._starting:
            if not self.response.prepared:
                await self.response.prepare(self._request)

    async def _ping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait_s = self._written_at + self._ping_interval_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            try:
                await self.write(PING)
            except ConnectionError:
                return  # the handler meets the same end
