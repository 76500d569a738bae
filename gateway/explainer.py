"""Keeps the window of `explain` filled and answers GET /explain from it. What it says is worked out in `explain/`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from ..core.errors import BadRequest
from .call import current_call
from .context import GATEWAY
from .errors import RouteNotFound
from .explain.summary import explain, report_request
from .explain.window import MAX_SPAN_S

SAMPLE_S = 1.0
DEFAULT_SPAN_S = 60.0


async def sampling(app: web.Application) -> AsyncIterator[None]:
    """Looks at the cluster once a second while the application runs."""
    task = asyncio.create_task(_sample(app))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _sample(app: web.Application) -> None:
    gateway = app[GATEWAY]
    while True:
        gateway.window_of_late.note_status(gateway.clock.now(), gateway.router.status())
        await asyncio.sleep(SAMPLE_S)


async def explain_cluster(request: web.Request) -> web.Response:
    """What the last `window_s` seconds say about where time goes."""
    gateway, span_s = request.app[GATEWAY], _span(request.query.get("window_s"))
    now = gateway.clock.now()
    gateway.window_of_late.note_status(now, gateway.router.status())
    return _json(explain(gateway.window_of_late, now, span_s))


async def explain_request(request: web.Request) -> web.Response:
    """One recent call, by the id of its answer or the label that its client gave it."""
    gateway, request_id = request.app[GATEWAY], request.match_info["request_id"]
    found = gateway.window_of_late.find(request_id, current_call().tenant)
    if not found:
        raise RouteNotFound("no recent request has this id; the gateway remembers the latest ones only", "request_id")
    now = gateway.clock.now()
    return _json({"requests": [report_request(facts, now) for facts in found]})


def _span(text: str | None) -> float:
    try:
        span_s = DEFAULT_SPAN_S if text is None else float(text)
    except ValueError:
        span_s = float("nan")
    if not 1 <= span_s <= MAX_SPAN_S:
        raise BadRequest(f"window_s: give a number of seconds from 1 to {MAX_SPAN_S:g}", "window_s")
    return span_s


def _json(document: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")
