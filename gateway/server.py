"""The life of the HTTP server: bind, serve, drain, end.

On SIGTERM: /ready says 503, new generations are refused, running streams go on for `grace_s`; what still runs then gets
an error event, and the process may exit.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from ..core.config import is_loopback
from ..core.errors import ConfigError, Unavailable
from .connection import connection_factory
from .context import GATEWAY, Gateway

logger = logging.getLogger(__name__)

ABORT_S = 2.0  # for error events to leave after the grace
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`allows_open_bind`: an address other than loopback without API keys is refused unless this says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 30.0
    ssl_context: ssl.SSLContext | None = None
    allows_open_bind: bool = False


def check_bind(options: ServeOptions, has_keys: bool) -> None:
    if not has_keys and not options.allows_open_bind and not is_loopback(options.host):
        raise ConfigError(
            f"host {options.host!r} is reachable from other machines and no API key is set; set api_keys, "
            "or bind 127.0.0.1, or allow the open bind explicitly"
        )


async def serve(
    app: web.Application,
    options: ServeOptions,
    *,
    stop: asyncio.Event | None = None,
    on_bound: Callable[[int], None] | None = None,
) -> None:
    """Serve until `stop` is set (without one: until SIGTERM or SIGINT), then drain. `on_bound` hears the port.

    Raises OSError when the address cannot be bound, ConfigError when it must not be.
    """
    gateway = app[GATEWAY]
    check_bind(options, bool(gateway.config.api_keys))
    stop = stop or _stop_on_signals()
    async with listening(app, options) as port:
        logger.info("gateway listens on %s port %s", options.host, port)
        if on_bound is not None:
            on_bound(port)
        await stop.wait()
        await drain(gateway, options.grace_s)


@asynccontextmanager
async def listening(app: web.Application, options: ServeOptions) -> AsyncIterator[int]:
    """The application behind an open port, which is the value. Handlers end when their client leaves."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=ABORT_S)
    await runner.setup()
    try:
        assert runner.server is not None  # set by setup
        loop = asyncio.get_running_loop()
        gateway = app[GATEWAY]
        factory = connection_factory(runner.server, gateway.config.limits, gateway.metrics.cut_slow_client, loop)
        listener = await loop.create_server(
            factory, options.host, options.port, ssl=options.ssl_context, backlog=BACKLOG
        )
        try:
            yield int(listener.sockets[0].getsockname()[1])
        finally:
            listener.close()
    finally:
        await runner.cleanup()


async def drain(gateway: Gateway, grace_s: float) -> None:
    """Close the door, let running generations finish, end the rest with an error that says why."""
    running = gateway.running
    running.is_draining = True
    gateway.router.drain()
    logger.info("draining generations=%s grace_s=%s", running.count, grace_s)
    if await _becomes_empty(gateway, grace_s):
        return
    logger.warning("grace is over, ending generations=%s", running.count)
    running.abort_all(Unavailable("this server is shutting down; send the request to another one"))
    await _becomes_empty(gateway, ABORT_S)


async def _becomes_empty(gateway: Gateway, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await gateway.running.wait_empty()
    except TimeoutError:
        return False
    return True


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
