"""One client connection: aiohttp's HTTP protocol with our bounds, and our error body for what is not HTTP.

A client that takes nothing while its buffer is full is cut after a while, be it a stream or one large answer.
What is buffered for a stream until then is bounded by the transport's high-water mark.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from ..core.errors import BadRequest, InternalError, ServeError
from .config import Limits
from .errors import SERVER_NAME, error_response

KEEPALIVE_S = 75.0  # longer than the usual proxy's 60


class Connection(web.RequestHandler):
    """Answers a request that could not even be read with the same body as every other error."""

    __slots__ = ("_bytes_left", "_on_cut", "_stall_timer", "_write_timeout_s")

    def __init__(
        self, server: web.Server, limits: Limits, on_cut: Callable[[], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE_S,
            access_log=None,  # type: ignore[arg-type]  # None means none; the annotation leaves it out
            max_line_size=limits.max_header_bytes,
            max_field_size=limits.max_header_bytes,
            auto_decompress=False,
            lingering_time=0.0,
        )
        self._write_timeout_s = limits.write_timeout_s
        self._on_cut = on_cut
        self._stall_timer: asyncio.TimerHandle | None = None
        self._bytes_left = 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        assert self.transport is not None  # the loop pauses connected protocols only
        self._bytes_left = self.transport.get_write_buffer_size()
        self._stall_timer = self._loop.call_later(self._write_timeout_s, self._check_progress)

    def _check_progress(self) -> None:
        transport = self.transport
        if transport is None:
            return
        if transport.get_write_buffer_size() < self._bytes_left:
            self._watch()
            return
        self._on_cut()
        transport.abort()

    def _stop_watching(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; no error can follow it")
        error: ServeError = InternalError("unexpected")
        if status < 500:
            self.logger.debug("unreadable request: %s", message)
            error = BadRequest("this is not a readable HTTP request; check its request line, headers and framing")
        else:
            self.log_exception("request failed", exc_info=exc)
        response = error_response(error, was_spent=False)
        response.headers["Server"] = SERVER_NAME
        response.force_close()
        return response


def connection_factory(
    server: web.Server, limits: Limits, on_cut: Callable[[], None], loop: asyncio.AbstractEventLoop
) -> Callable[[], asyncio.Protocol]:
    """A maker of connections for `loop.create_server`. `on_cut` hears of each client that was cut."""
    return lambda: Connection(server, limits, on_cut, loop)
