"""What every handler may reach, and the generations that run now."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from ..core.clock import Clock
from ..core.errors import ServeError, Unavailable
from ..core.ids import IdSource
from ..router.interface import Router
from .config import GatewayConfig
from .explain.window import Window
from .limits import Admission
from .metrics import GatewayMetrics
from .prompts import PromptReader
from .tokens import GatewayTokenizer

WINDOW_AGE_S = 1.0  # how old the router's word about the longest sequence may be


class Abortable(Protocol):
    def abort(self, error: ServeError) -> None: ...


class RunningGenerations:
    """The generations in progress. A drain closes the door, then waits for the room to empty."""

    def __init__(self) -> None:
        self.is_draining = False
        self._running: dict[int, Abortable] = {}
        self._changed = asyncio.Event()

    @property
    def count(self) -> int:
        return len(self._running)

    @contextmanager
    def hold(self, generation: Abortable) -> Iterator[None]:
        """Register a generation while it runs; raises Unavailable once draining."""
        if self.is_draining:
            raise Unavailable("this server is shutting down; send the request to another one")
        self._running[id(generation)] = generation
        try:
            yield
        finally:
            del self._running[id(generation)]
            self._changed.set()

    async def wait_empty(self) -> None:
        while self._running:
            self._changed.clear()
            await self._changed.wait()

    def abort_all(self, error: ServeError) -> None:
        for generation in list(self._running.values()):
            generation.abort(error)


@dataclass(slots=True)
class Gateway:
    """The parts of one application."""

    config: GatewayConfig
    router: Router
    tokenizer: GatewayTokenizer
    clock: Clock
    ids: IdSource
    metrics: GatewayMetrics
    reader: PromptReader
    admission: Admission
    wall_clock: Callable[[], float]  # seconds since 1970, for the `created` fields only
    started_at: int
    running: RunningGenerations = field(default_factory=RunningGenerations)
    window_of_late: Window = field(default_factory=Window)
    _window: int = 0
    _window_until_s: float = float("-inf")

    def window(self) -> int:
        """The longest prompt + output that can be served now."""
        now = self.clock.now()
        if now >= self._window_until_s:
            held = self.router.status().max_sequence_tokens
            self._window = min(self.config.max_model_len, held) if held else self.config.max_model_len
            self._window_until_s = now + WINDOW_AGE_S
        return self._window

    def created(self) -> int:
        return int(self.wall_clock())


GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)
