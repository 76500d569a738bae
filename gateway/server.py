"""The life of the HTTP server: bind, serve, drain, end.

On SIGTERM: /ready says 503, new generations are refused, running streams go on for `grace_s`; what still runs then gets
an error event, and the process may exit.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from ..core.errors import ConfigError, Unavailable
from .context import GATEWAY, Gateway

logger = logging.getLogger(__name__)

ABORT_S = 2.0  # for error events to leave after the grace
KEEPALIVE_S = 75.0
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`allows_open_bind`: an address other than loopback without API keys is refused unless this says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000
    grace_s: float = 30.0
    ssl_context: ssl.SSLContext | None = None
    allows_open_bind: bool = False


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    """Serve until `stop` is set (without one: until SIGTERM or SIGINT), then drain. `on_bound` hears the port."""
    gateway = app[GATEWAY]
    check_bind(options, bool(gateway.config.api_keys))
    stop = stop or _stop_on_signals()
    runner = make_runner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port, ssl_context=options.ssl_context, backlog=BACKLOG)
        await site.start()
        port = int(runner.addresses[0][1])
        logger.info("gateway listens on %s port %s", options.host, port)
        if on_bound is not None:
            on_bound(port)
        await stop.wait()
        await drain(gateway, options.grace_s)
    finally:
        await runner.cleanup()


def make_runner(app: web.Application) -> web.AppRunner:
    """aiohttp's runner with our bounds. Handlers end when their client leaves; bodies are never decompressed."""
    limits = app[GATEWAY].config.limits
    return web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=KEEPALIVE_S,
        max_line_size=limits.max_header_bytes,
        max_field_size=limits.max_header_bytes,
        auto_decompress=False,
        lingering_time=0.0,
        shutdown_timeout=ABORT_S,
    )


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
