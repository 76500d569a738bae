"""Server-sent events to one client.

The response starts with the first event (or the first ping), so a failure before any token still has its own HTTP
status. A write waits only while the client's buffer is full, and connection.py ends that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class SseWriter:
    """One event stream. Raises ConnectionError when the client is gone."""

    def __init__(self, request: web.Request, headers: dict[str, str], ping_interval_s: float) -> None:
        self.response = web.StreamResponse(headers=HEADERS | headers)
        self._request = request
        self._ping_interval_s = ping_interval_s
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
        await self.response.write(frame)

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
