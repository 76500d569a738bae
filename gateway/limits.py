"""Bounds on what comes in: how many requests at once, how large a body, how long it may take to arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import hdrs, web
from aiohttp.client_exceptions import ClientPayloadError
from aiohttp.web_exceptions import HTTPRequestEntityTooLarge

from ..core.errors import BadRequest, Overloaded
from .config import Limits
from .errors import BodyTimeout, BodyTooLarge, NotJson


class Admission:
    """Counts the requests that hold memory here and refuses those over the bound."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self.active = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the slots; raises Overloaded when all are taken."""
        if self.active >= self._max_requests:
            raise Overloaded(f"{self.active} requests are open, the bound is {self._max_requests}; try again later")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1


def check_headers(request: web.Request, limits: Limits) -> None:
    """Refuse by the headers alone what could not be taken anyway."""
    if request.content_type != "application/json":
        raise NotJson(f"Content-Type is {request.content_type!r}; send 'Content-Type: application/json'")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise NotJson("Content-Encoding is not supported; send the body uncompressed")
    if (request.content_length or 0) > limits.max_body_bytes:
        raise BodyTooLarge(f"the body has {request.content_length} bytes, the bound is {limits.max_body_bytes}")


async def read_body(request: web.Request, limits: Limits) -> bytes:
    """The whole body; raises BodyTooLarge, BodyTimeout, NotJson or BadRequest."""
    check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.read()
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    except HTTPRequestEntityTooLarge:
        raise BodyTooLarge(f"the body has more than {limits.max_body_bytes} bytes") from None
    except (ClientPayloadError, web.RequestPayloadError):
        raise BadRequest("the body is torn: its framing does not match the headers") from None
