"""An OpenAI-compatible server that does what a script says, to the moment, and keeps its own record of it.

A load test is proved by it: what the client reports must be what this server knows it has done. As a command it is
something to point a client at: `python -m penstock.testing.mock_server --port 8001 --ttft-ms 50 --tpot-ms 10`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from ..core.clock import Clock, MonotonicClock

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """One event: so long after the one before it, with so many tokens. `text` None: one word a token."""

    after_s: float
    tokens: int = 1
    text: str | None = None

    @property
    def shown(self) -> str:
        return " word" * self.tokens if self.text is None else self.text


@dataclass(frozen=True, slots=True)
class Script:
    """What happens to one request. The first piece's `after_s` is the TTFT. A `status` but 200 is an error."""

    pieces: tuple[Piece, ...] = ()
    status: int = 200
    prompt_tokens: int = 10
    cached_tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    has_usage: bool = True
    cut_after: int | None = None  # the connection breaks behind so many pieces
    error_after: int | None = None  # an error event comes behind so many pieces
    end_s: float = 0.0  # from the last piece to the end of the stream
    penstock: dict[str, float] | None = None


def steady(ttft_s: float, tpot_s: float, num_tokens: int, tokens_each: int = 1, **rest: Any) -> Script:
    """`num_tokens` in chunks of `tokens_each`, `tpot_s` a token."""
    left = num_tokens
    pieces: list[Piece] = []
    while left > 0:
        count = min(tokens_each, left)
        pieces.append(Piece(tpot_s * count if pieces else ttft_s, count))
        left -= count
    return Script(tuple(pieces), **rest)


@dataclass(slots=True)
class Served:
    """The server's record of one request; seconds of its clock."""

    number: int
    path: str
    body: Body
    received_s: float
    written: list[tuple[float, int]] = field(default_factory=list)  # (when, tokens) of each piece
    ended_s: float | None = None


class MockServer:
    """`script` gets a request's number and body. With `slots` each request first holds one of so many
    slots for `service_s`, and waits while none is free: the server has a capacity.
    """

    def __init__(
        self,
        script: Callable[[int, Body], Script],
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        model: str = "mock",
        max_model_len: int | None = 4096,
        takes_chunk_usage: bool = True,
        slots: int = 0,
        service_s: float = 0.0,
        explanation: Body | None = None,
    ) -> None:
        self.served: list[Served] = []
        self.num_resets = 0
        self._script, self._clock, self._sleep = script, clock or MonotonicClock(), sleep
        self._model, self._max_model_len, self._takes_chunk_usage = model, max_model_len, takes_chunk_usage
        self._slots = asyncio.Semaphore(slots) if slots else None
        self._service_s, self._explanation = service_s, explanation

    def app(self) -> web.Application:
        app = web.Application(client_max_size=256 << 20)
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._generate),
                web.post("/v1/chat/completions", self._generate),
                web.post("/reset_prefix_cache", self._reset),
                *([] if self._explanation is None else [web.get("/explain", self._explain)]),
            ]
        )
        return app

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[str]:
        """The URL, on loopback."""
        runner = web.AppRunner(self.app(), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def at(self, path: str) -> AsyncIterator[None]:
        """Listens at a Unix socket."""
        runner = web.AppRunner(self.app(), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.UnixSite(runner, path).start()
            yield
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        row: Body = {"id": self._model, "object": "model"}
        if self._max_model_len is not None:
            row["max_model_len"] = self._max_model_len
        return web.json_response({"object": "list", "data": [row]})

    async def _explain(self, request: web.Request) -> web.Response:
        return web.json_response({"window_s": float(request.query["window_s"])} | (self._explanation or {}))

    async def _reset(self, request: web.Request) -> web.Response:
        self.num_resets += 1
        return web.json_response({"status": "ok"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["stream_options"].get("continuous_usage_stats") and not self._takes_chunk_usage:
            return _error(400, "stream_options: unknown field continuous_usage_stats")
        served = Served(len(self.served), request.path, body, self._clock.now())
        self.served.append(served)
        script = self._script(served.number, body)
        try:
            if self._slots is not None:
                async with self._slots:
                    await self._sleep(self._service_s)
            return await self._answer(request, served, script)
        finally:
            served.ended_s = self._clock.now()

    async def _answer(self, request: web.Request, served: Served, script: Script) -> web.StreamResponse:
        if script.status != 200:
            return _error(script.status, f"scripted {script.status}")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        writer = _Writer(response, script, served)
        if request.path.endswith("chat/completions"):
            await writer.send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for number, piece in enumerate(script.pieces):
            if number in (script.cut_after, script.error_after):
                break
            await self._sleep(piece.after_s)
            served.written.append((self._clock.now(), piece.tokens))
            await writer.piece(piece)
        if script.cut_after is not None and request.transport is not None:
            request.transport.abort()
            return response
        if script.error_after is not None:
            await response.write(b'data: {"error": {"message": "scripted error", "type": "server_error"}}\n\n')
            return response
        await self._sleep(script.end_s)
        await writer.end()
        return response


class _Writer:
    """Chunks of one answer."""

    def __init__(self, response: web.StreamResponse, script: Script, served: Served) -> None:
        self._response, self._script = response, script
        self._is_chat = served.path.endswith("chat/completions")
        options = served.body["stream_options"]
        self._has_chunk_usage = bool(options.get("continuous_usage_stats")) and script.has_usage
        self._tokens = 0

    async def piece(self, piece: Piece) -> None:
        self._tokens += piece.tokens
        said: Body = {"delta": {"content": piece.shown}} if self._is_chat else {"text": piece.shown}
        await self.send([{"index": 0, "finish_reason": None} | said])

    async def end(self) -> None:
        said: Body = {"delta": {}} if self._is_chat else {"text": ""}
        await self.send([{"index": 0, "finish_reason": "length"} | said])
        if self._script.has_usage:
            await self.send([], is_last=True)
        await self._response.write(b"data: [DONE]\n\n")

    async def send(self, choices: list[Body], is_last: bool = False) -> None:
        document: Body = {"choices": choices, "usage": self._usage() if is_last or self._has_chunk_usage else None}
        if is_last and self._script.penstock is not None:
            document["penstock"] = self._script.penstock
        await self._response.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _usage(self) -> Body:
        script = self._script
        return {
            "prompt_tokens": script.prompt_tokens,
            "completion_tokens": self._tokens,
            "prompt_tokens_details": {"cached_tokens": script.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": script.accepted,
                "rejected_prediction_tokens": script.rejected,
            },
        }


def _error(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return web.json_response({"error": error}, status=status)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--tpot-ms", type=float, default=10.0)
    parser.add_argument("--tokens-each", type=int, default=1, help="tokens in a chunk")
    args = parser.parse_args()

    def script(_: int, body: Body) -> Script:
        return steady(args.ttft_ms / 1e3, args.tpot_ms / 1e3, int(body.get("max_tokens") or 16), args.tokens_each)

    web.run_app(MockServer(script).app(), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
