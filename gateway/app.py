"""The application: routes, middlewares, and what they share."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from ..core.clock import Clock
from ..core.errors import ConfigError
from ..core.ids import IdSource
from ..protocol.sampling import MAX_CHOICES
from ..router.interface import Router
from . import operations
from .auth import OPEN_ROUTES, KeyRing, auth_middleware
from .call import Handler, call_middleware
from .chat import chat_completions
from .completions import completions
from .config import GatewayConfig
from .context import GATEWAY, Gateway
from .cors import add_cors_headers, cors_middleware
from .errors import SERVER_NAME, error_middleware
from .explainer import explain_cluster, explain_request, sampling
from .limits import Admission
from .metrics import GatewayMetrics
from .prompts import PromptReader
from .tokenization import detokenize, tokenize
from .tokens import GatewayTokenizer


def create_app(
    config: GatewayConfig,
    router: Router,
    tokenizer: GatewayTokenizer,
    clock: Clock,
    ids: IdSource,
    wall_clock: Callable[[], float] = time.time,
) -> web.Application:
    """The gateway as an aiohttp application; `serve` runs it. Raises ConfigError."""
    check_config(config)
    gateway = Gateway(
        config=config,
        router=router,
        tokenizer=tokenizer,
        clock=clock,
        ids=ids,
        metrics=GatewayMetrics(router),
        reader=PromptReader(tokenizer, config.limits, config.max_model_len),
        admission=Admission(config.limits.max_concurrent_requests),
        wall_clock=wall_clock,
        started_at=int(wall_clock()),
    )
    open_routes = OPEN_ROUTES | {"/metrics"} if config.has_open_metrics else OPEN_ROUTES
    middlewares = [
        call_middleware(ids),
        counting_middleware,
        error_middleware,
        cors_middleware(config.cors_origins),
        auth_middleware(KeyRing(config.api_keys), open_routes),
    ]
    app = web.Application(middlewares=middlewares, client_max_size=config.limits.max_body_bytes)
    app[GATEWAY] = gateway
    app.on_response_prepare.append(_name_server)
    if config.cors_origins:
        app.on_response_prepare.append(add_cors_headers(config.cors_origins))
    app.on_cleanup.append(_close)
    app.cleanup_ctx.append(sampling)
    _add_routes(app)
    return app


def check_config(config: GatewayConfig) -> None:
    if config.max_model_len < 2:
        raise ConfigError(f"max_model_len is {config.max_model_len}; it must hold a prompt token and an output token")
    if not 1 <= config.limits.max_n <= MAX_CHOICES:
        raise ConfigError(f"max_n is {config.limits.max_n}; it must be from 1 to {MAX_CHOICES}")
    if any(not key for key in config.api_keys):
        raise ConfigError("an API key is empty; remove it or give it a value")
    if config.ping_interval_s <= 0 or config.timeout_s <= 0:
        raise ConfigError(
            f"ping_interval_s is {config.ping_interval_s}, timeout_s is {config.timeout_s}; both must be more than 0"
        )


@web.middleware
async def counting_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts answers by route. The route's pattern is the label: the client's path would let it invent series."""
    response = await handler(request)
    resource = request.match_info.route.resource
    request.app[GATEWAY].metrics.answered("unknown" if resource is None else resource.canonical, response.status)
    return response


def _add_routes(app: web.Application) -> None:
    app.add_routes(
        [
            web.post("/v1/completions", completions),
            web.post("/v1/chat/completions", chat_completions),
            web.get("/v1/models", operations.models),
            web.get("/v1/models/{model:.+}", operations.model),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
            web.get("/health", operations.ready),
            web.get("/live", operations.live),
            web.get("/ready", operations.ready),
            web.get("/version", operations.version),
            web.get("/metrics", operations.metrics),
            web.get("/status", operations.status),
            web.get("/explain", explain_cluster),
            web.get("/explain/{request_id:.+}", explain_request),
            web.post("/workers/{worker}/role", operations.set_role),
            web.post("/reset_prefix_cache", operations.reset_prefix_cache),
        ]
    )


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER_NAME


async def _close(app: web.Application) -> None:
    app[GATEWAY].reader.close()
