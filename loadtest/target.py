"""What a server is: which model, how long its window, what its usage says, tokens of a word. Asked before a run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import aiohttp
import msgspec

from ..core.errors import ConfigError
from .client import Call, Client
from .plan import Conversation, Filling, Turn
from .record import Asked, ErrorKind, Record
from .rendering import Renderer
from .sending import PATHS, Dialogue, RequestForm
from .workloads import PROMPT

PROBE_WORDS = (64, 192)


class ModelRow(msgspec.Struct, frozen=True):
    id: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True):
    data: tuple[ModelRow, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A server as it was found."""

    url: str
    model: str
    max_model_len: int | None


async def find_target(client: Client, model: str | None) -> Target:
    """The server's model: the named one, or its first. Raises ConfigError when there is no such server or model."""
    try:
        async with asyncio.timeout(30), client.http.get(client.url + "/v1/models") as response:
            raw = await response.read()
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError) as err:
        raise ConfigError(f"no answer from {client.url}: {err or type(err).__name__}; is the server running?") from err
    if status in (401, 403):
        raise ConfigError(f"{client.url} answered {status}: give the key with --api-key")
    try:
        rows = msgspec.json.decode(raw, type=ModelList).data if status == 200 else ()
    except msgspec.MsgspecError:
        rows = ()
    named = [row for row in rows if model in (None, row.id)]
    if named:
        return Target(client.url, named[0].id, named[0].max_model_len)
    if model is None:
        raise ConfigError(f"{client.url}/v1/models names no model; give it with --model")
    if rows:
        raise ConfigError(f"--model: {model!r} is not served; {client.url} has {', '.join(row.id for row in rows)}")
    return Target(client.url, model, None)


async def agree_on_form(client: Client, form: RequestForm) -> RequestForm:
    """The form that the server takes, with usage in every chunk if it can. Raises ConfigError when nothing works."""
    record = await _ask(client, form, Renderer(), 16)
    if record.failure is not None and record.failure.kind is ErrorKind.BAD_REQUEST and form.has_chunk_usage:
        return await agree_on_form(client, replace(form, has_chunk_usage=False))
    if record.failure is not None and record.failure.kind is not ErrorKind.EMPTY:
        raise ConfigError(f"{client.url} did not answer a request for two tokens: {record.failure.detail}")
    return form


async def calibrate(client: Client, form: RequestForm, renderer: Renderer) -> Renderer:
    """How many tokens a word of ours and the chat template have here, from the prompt tokens of two requests.

    Without usage the renderer stays as it is: one token a word.
    """
    few, many = [await _ask(client, form, replace(renderer, salt=7), count) for count in PROBE_WORDS]
    if few.use.prompt_tokens is None or many.use.prompt_tokens is None:
        return renderer
    per_word = (many.use.prompt_tokens - few.use.prompt_tokens) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    if per_word <= 0:
        return renderer
    overhead = max(0, round(few.use.prompt_tokens - per_word * PROBE_WORDS[0]))
    return replace(renderer, tokens_per_word=per_word, overhead_tokens=overhead)


async def _ask(client: Client, form: RequestForm, renderer: Renderer, count: int) -> Record:
    turn = Turn((Filling((PROMPT, 0, count), count),), 2)
    body = Dialogue(Conversation((turn,)), form, renderer).body(turn)
    record, _ = await client.send(Call(Asked(0, 0.0, count, 2), PATHS[form.endpoint], body), 0.0)
    return record


async def reset_cache(client: Client) -> None:
    """Forget retained prefixes, where the server offers it. Raises ConfigError where it does not."""
    try:
        async with asyncio.timeout(30), client.http.post(client.url + "/reset_prefix_cache") as response:
            status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError) as err:
        raise ConfigError(f"no answer from {client.url}/reset_prefix_cache: {err}") from err
    if status != 200:
        raise ConfigError(f"--reset-cache: {client.url} answered {status} to POST /reset_prefix_cache; leave it out")
