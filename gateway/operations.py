"""The routes for operators: probes, models, version, metrics, status, cache reset. No generations here."""

from __future__ import annotations

import msgspec
from aiohttp import web

from .. import __version__
from ..core.errors import ModelNotFound
from ..protocol.messages import Role
from .bodies import decode, shorten
from .context import GATEWAY, Gateway
from .limits import read_body
from .metrics import CONTENT_TYPE


async def live(request: web.Request) -> web.Response:
    """200 as long as this process answers, whatever the cluster does."""
    return _json({"status": "live"})


async def ready(request: web.Request) -> web.Response:
    """200 when a request sent now would be taken, 503 otherwise and while draining."""
    reason = _why_not_ready(request.app[GATEWAY])
    if reason is None:
        return _json({"status": "ready"})
    return _json({"status": "not ready", "reason": reason}, status=503)


async def models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    return _json({"object": "list", "data": [_model(gateway, name) for name in gateway.config.model_names]})


async def model(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    name = request.match_info["model"]
    if name not in gateway.config.model_names:
        raise ModelNotFound(
            f"the model {shorten(name)} does not exist here; GET /v1/models lists those that do", "model"
        )
    return _json(_model(gateway, name))


async def version(request: web.Request) -> web.Response:
    return _json({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[GATEWAY].metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def status(request: web.Request) -> web.Response:
    """What `penstock status` prints: the router's own view of the cluster."""
    gateway = request.app[GATEWAY]
    return _json(msgspec.structs.asdict(gateway.router.status()) | {"is_draining": gateway.running.is_draining})


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """Forget all retained prefixes, so that a benchmark starts cold."""
    request.app[GATEWAY].router.reset_prefix_cache()
    return _json({"status": "ok"})


class RoleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role


async def set_role(request: web.Request) -> web.Response:
    """Give a worker another role; /status shows it once the worker has it."""
    gateway = request.app[GATEWAY]
    body = decode(await read_body(request, gateway.config.limits), RoleBody)
    gateway.router.set_role(request.match_info["worker"], body.role)
    return _json({"status": "ok"})


def _why_not_ready(gateway: Gateway) -> str | None:
    if gateway.running.is_draining:
        return "draining"
    state = gateway.router.status()
    return None if state.ready else state.why_not_ready or "no worker is ready"


def _model(gateway: Gateway, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": gateway.started_at,
        "owned_by": "penstock",
        "root": gateway.config.model_name,
        "max_model_len": gateway.config.max_model_len,
    }


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(document), content_type="application/json")
