"""Cross-origin requests: off unless origins are named. Origins are compared whole, without wildcards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from .call import CLASS_HEADER, REQUEST_ID_HEADER, TPOT_HEADER, TTFT_HEADER, Handler

MAX_AGE_S = 600

PrepareHook = Callable[[web.Request, web.StreamResponse], Awaitable[None]]


def cors_headers(origin: str) -> dict[str, str]:
    return {
        hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin,
        hdrs.ACCESS_CONTROL_EXPOSE_HEADERS: f"{REQUEST_ID_HEADER}, Retry-After",
        hdrs.VARY: "Origin",
    }


def _preflight(origin: str) -> web.Response:
    allowed = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: ", ".join(
            ("Authorization", "Content-Type", REQUEST_ID_HEADER, CLASS_HEADER, TTFT_HEADER, TPOT_HEADER)
        ),
        hdrs.ACCESS_CONTROL_MAX_AGE: str(MAX_AGE_S),
    }
    return web.Response(status=204, headers=cors_headers(origin) | allowed)


def cors_middleware(origins: Iterable[str]) -> Middleware:
    """Outside of authentication: a browser sends its preflight without a key."""
    known = frozenset(origins)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin not in known:
            return await handler(request)
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            return _preflight(origin)
        return await handler(request)

    return middleware


def add_cors_headers(origins: Iterable[str]) -> PrepareHook:
    """A signal handler: answers and streams to a known origin say so before their headers leave."""
    known = frozenset(origins)

    async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin in known:
            response.headers.update(cors_headers(origin))

    return on_prepare
