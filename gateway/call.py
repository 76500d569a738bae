"""What belongs to one HTTP call: its id, its tenant, whether it has cost tokens. A context variable of its task."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Middleware

from ..core.ids import IdSource

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID_HEADER = "X-Request-Id"
SESSION_HEADER = "X-Session-Id"
CLASS_HEADER = "X-Penstock-Class"
TTFT_HEADER = "X-Penstock-TTFT-Target"
TPOT_HEADER = "X-Penstock-TPOT-Target"
MAX_REQUEST_ID_CHARS = 128
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._:-]")


@dataclass(slots=True)
class Call:
    """`request_id` is a label: the client may choose it, so it never addresses anything inside."""

    request_id: str
    tenant: str = ""  # empty: one cache for all
    is_spent: bool = False  # tokens may have been produced
    session: str = ""  # the client's name of its conversation; a label too
    class_name: str = ""  # what the headers say of its urgency, unchecked
    ttft_target: str = ""
    tpot_target: str = ""


_call: ContextVar[Call] = ContextVar("penstock_call")


def current_call() -> Call:
    """The call of this task. Outside of a call: a fresh one nobody looks at."""
    return _call.get(Call("-"))


def request_label(header: str | None, ids: IdSource) -> str:
    """The client's own id, cut and cleaned, or a new one."""
    cleaned = _NOT_IN_IDS.sub("", (header or "")[:MAX_REQUEST_ID_CHARS])
    return cleaned or f"req-{ids.token(12).hex()}"


def call_middleware(ids: IdSource) -> Middleware:
    """Outermost: opens the call and echoes its id on whatever answer leaves."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        call = Call(request_label(request.headers.get(REQUEST_ID_HEADER), ids))
        call.session = request.headers.get(SESSION_HEADER, "")
        call.class_name = request.headers.get(CLASS_HEADER, "")
        call.ttft_target = request.headers.get(TTFT_HEADER, "")
        call.tpot_target = request.headers.get(TPOT_HEADER, "")
        token = _call.set(call)
        try:
            response = await handler(request)
        finally:
            _call.reset(token)
        if not response.prepared:
            response.headers[REQUEST_ID_HEADER] = call.request_id
        return response

    return middleware
