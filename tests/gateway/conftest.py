"""A real HTTP server on a free port, a router that answers with fixed tokens, and a tokenizer of single bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import yaml
from aiohttp import web

from penstock.core.clock import MonotonicClock
from penstock.core.errors import BadRequest, ServeError
from penstock.core.ids import SeededIds
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig, Limits
from penstock.gateway.context import GATEWAY, Gateway
from penstock.gateway.server import ServeOptions, listening
from penstock.protocol.messages import Phases, Role, SampledToken, TokenLogprob, WorkerLoad
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import ClusterStatus, EndEvent, Event, GenerateRequest, TokensEvent, WorkerStatus

EOS = 256
REPLY = "The quick brown fox jumps over the lazy dog. "
PHASES = Phases(
    queue_s=0.001, prefill_s=0.002, transfer_s=0.003, cached_tokens=4, transferred_blocks=2, transferred_bytes=64
)


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text, the rest of the vocabulary is words of two letters."""

    vocab_size = 300
    special_ids = frozenset({EOS})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(text.encode())
        except UnicodeEncodeError as err:
            raise BadRequest("the text holds half of a surrogate pair") from err

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in token_ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return b"<|eos|>" if token_id == EOS else b"w" + bytes([token_id - 257 + 97])

    def encode_chat(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True) -> list[int]:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))


@dataclass
class FakeStream:
    """The events of one request. `hold_before` waits for `release` (or cancel) before that token."""

    router: FakeRouter
    request: GenerateRequest
    cancelled: bool = False
    cancelled_choices: set[int] = field(default_factory=set)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0

    def cancel(self, choice: int | None = None) -> None:
        if choice is None:
            self.cancelled = True
            self.wake.set()
        else:
            self.cancelled_choices.add(choice)

    async def __aiter__(self) -> AsyncIterator[Event]:
        self.router.entered.set()
        params = self.request.params
        scripts = [self.router.script(self.request, choice) for choice in range(params.n)]
        index = 0
        while not self.cancelled and len(self.cancelled_choices) < params.n and any(len(s) >= index for s in scripts):
            if index == self.router.hold_before:
                await self.wake.wait()
            if index == self.router.fail_before:
                yield EndEvent(error=self.router.error, attempts=self.router.attempts)
                return
            await asyncio.sleep(0)
            for choice, script in enumerate(scripts):
                event = _event(script, choice, index, params, self.router.phases)
                if event is not None and choice not in self.cancelled_choices and not self.cancelled:
                    self.sent += 1
                    yield event
            index += 1
        yield EndEvent(attempts=self.router.attempts, route_s=0.0005, resumed=self.router.resumed)


def _event(script: list[int], choice: int, index: int, params: SamplingParams, phases: Phases) -> TokensEvent | None:
    """Token `index` of a script; the last one ends the choice with "length", an EOS after it with "stop"."""
    if index >= len(script):
        return None
    ended = (script[index] == EOS and not params.ignore_eos) or script[index] in params.stop_token_ids
    if ended:
        return TokensEvent(choice, index, (), "stop", stop_token=script[index])
    is_last = index + 1 >= min(params.max_tokens, len(script))
    token = SampledToken(script[index], _logprob(script[index], params.logprobs))
    first = phases if index == 0 else None
    return TokensEvent(choice, index, (token,), "length" if is_last else None, phases=first)


def _logprob(token_id: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    top = tuple(((token_id + i) % 256, -0.5 - i) for i in range(num_top))
    return TokenLogprob(-0.5, top)


@dataclass
class FakeRouter:
    """`reply` is what every choice says, over and over up to max_tokens; `ends` puts an EOS after the first time."""

    reply: str | bytes = REPLY
    ends: bool = False
    hold_before: int | None = None
    fail_before: int | None = None
    error: ServeError | None = None
    refuse: ServeError | None = None
    phases: Phases = PHASES
    attempts: int = 1
    resumed: int = 0
    is_ready: bool = True
    max_sequence_tokens: int = 0
    streams: list[FakeStream] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    is_draining: bool = False
    num_resets: int = 0
    roles: list[tuple[str, Role]] = field(default_factory=list)

    def script(self, request: GenerateRequest, choice: int) -> list[int]:
        once = list(self.reply if isinstance(self.reply, bytes) else self.reply.encode())
        num_tokens = request.params.max_tokens
        if self.ends:
            return [*once, EOS][:num_tokens]
        return (once * (num_tokens // len(once) + 1))[:num_tokens]

    def submit(self, request: GenerateRequest) -> FakeStream:
        if self.refuse is not None:
            raise self.refuse
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    def release(self) -> None:
        self.hold_before = None
        for stream in self.streams:
            stream.wake.set()

    def status(self) -> ClusterStatus:
        load = WorkerLoad(total_blocks=100, free_blocks=60, running=3, preemptions=7)
        worker = WorkerStatus(
            "decode-0",
            "00" * 8,
            "decode",
            1,
            "ready",
            load,
            3,
            0,
            60,
            100,
            {"prefill-0": "shm"},
            breakers={"prefill": 1.5},
        )
        return ClusterStatus(
            self.is_ready,
            "" if self.is_ready else "no decode worker",
            "auto",
            [worker],
            3,
            0,
            1024,
            self.max_sequence_tokens,
            role_change_counts=[("decode", "both", "planner", 2)],
        )

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    def set_role(self, worker_id: str, role: Role) -> None:
        if worker_id != "decode-0":
            raise BadRequest(f"worker {worker_id!r} is not there", "worker")
        self.roles.append((worker_id, role))

    def drain(self) -> None:
        self.is_draining = True

    @property
    def only(self) -> FakeStream:
        (stream,) = self.streams
        return stream


@dataclass
class Served:
    """A running gateway and a client for it."""

    url: str
    port: int
    router: FakeRouter
    http: aiohttp.ClientSession
    app: web.Application

    @property
    def gateway(self) -> Gateway:
        return self.app[GATEWAY]

    async def post(self, path: str, body: object, **kwargs: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body, **kwargs) as response:
            return response.status, await response.json()

    async def completion(self, **body: Any) -> Any:
        status, answer = await self.post("/v1/completions", {"model": "toy", "prompt": "hi", **body})
        assert status == 200, answer
        return answer

    async def chat(self, **body: Any) -> Any:
        messages = [{"role": "user", "content": "hi"}]
        status, answer = await self.post("/v1/chat/completions", {"model": "toy", "messages": messages, **body})
        assert status == 200, answer
        return answer

    async def events(self, path: str, **body: Any) -> list[Any]:
        """The data of each event of a stream; [DONE] as a string, pings as None."""
        start = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
        async with self.http.post(self.url + path, json={"model": "toy", "stream": True, **start, **body}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        return [_event_data(part) for part in text.split("\n\n")[:-1]]


def _event_data(part: str) -> Any:
    if part.startswith(":"):
        return None
    assert part.startswith("data: "), part
    return "[DONE]" if part == "data: [DONE]" else json.loads(part[6:])


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def _serve(
    limits: dict[str, Any] | None = None, config: dict[str, Any] | None = None, **router: Any
) -> AsyncIterator[Served]:
    """A gateway in front of FakeRouter(**router); `config` and `limits` replace defaults."""
    settings = replace(
        GatewayConfig("toy", 4096, aliases=("toy-alias",)), limits=Limits(**(limits or {})), **(config or {})
    )
    fake = FakeRouter(**router)
    app = create_app(settings, fake, ByteTokenizer(), MonotonicClock(), SeededIds(1), wall_clock=lambda: 1.7e9)
    async with listening(app, ServeOptions(port=0)) as port:
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
                yield Served(f"http://127.0.0.1:{port}", port, fake, http, app)
        finally:
            fake.release()


@pytest.fixture
def serve() -> Serve:
    """`async with serve(reply="…", config={…}, limits={…}) as served`."""
    return _serve


@pytest.fixture(scope="session")
def openai_schema(shared_data: Callable[[str], Path]) -> Callable[[str, Any], None]:
    """`openai_schema(name, document)` checks a document against OpenAI's own description of its API."""
    with gzip.open(shared_data("openai-openapi") / "openapi.yaml.gz") as file:
        schemas = yaml.load(file, Loader=_Loader)["components"]["schemas"]
    root = _with_nulls({"components": {"schemas": schemas}})

    def check(name: str, document: Any) -> None:
        jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **root}).validate(document)

    return check


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C loader where it is built
    """A safe loader that reads dates as text."""


def _with_nulls(schema: Any) -> Any:
    """OpenAPI 3.0's `nullable: true`, which the file still uses here and there, in JSON Schema's words."""
    if isinstance(schema, list):
        return [_with_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _with_nulls(value) for key, value in schema.items()}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain
