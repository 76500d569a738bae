"""The JSON bodies we take, with the type and the bound of each field. A null means: the default.

Unknown fields are ignored. Fields that other servers act upon and we do not are in `REFUSED`: anything but a harmless
value is an error, because to ignore them would give an answer that the caller did not ask for.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ..core.errors import BadRequest
from ..protocol.sampling import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS, MAX_TOKENS, TokenId
from .errors import Unsupported

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_PARTS = 1024

TokenCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Label = Annotated[str, msgspec.Meta(max_length=512)]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]

REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "image_url": (),
    "json_schema": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_Refused = msgspec.defstruct("_Refused", [(name, Any, None) for name in REFUSED], frozen=True, kw_only=True)


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both generation endpoints share. Bounds are those of protocol/sampling.py, or OpenAI's."""

    model: ModelName
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP_IDS)] | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100, le=100)]], msgspec.Meta(max_length=MAX_LOGIT_BIAS)]
        | None
    ) = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    user: Annotated[str, msgspec.Meta(max_length=1 << 20)] | None = None  # keeps a conversation on its worker
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None = None  # lower is sooner
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None


class CompletionBody(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt` is checked by prompts.py: a string, strings, token ids, or lists of token ids."""

    prompt: str | list[Any]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: Annotated[str, msgspec.Meta(max_length=64)]
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], msgspec.Meta(max_length=MAX_PARTS)] | None = None
    name: Label | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None


class ChatBody(SamplingFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=4096)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: either a prompt or messages."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], msgspec.Meta(max_length=1 << 20)]
    model: ModelName | None = None


T = TypeVar("T")

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_MISSING = re.compile(r"missing required field `(\w+)`")


def decode(data: bytes, kind: type[T]) -> T:
    """`data` as `kind`; raises BadRequest that names the field and its value."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as err:
        raise _explain(data, str(err)) from None
    except RecursionError:
        raise BadRequest("the JSON body is nested too deeply") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    except (msgspec.DecodeError, ValueError) as err:
        raise BadRequest(f"the body is not JSON: {err}") from None


def check_refused(data: bytes) -> dict[str, Any]:
    """Refuse parameters that this server does not do. Returns all fields of REFUSED."""
    fields = decode(data, _Refused)
    given = {name: getattr(fields, name) for name in REFUSED}
    for name, value in given.items():
        if value is not None and value not in REFUSED[name] and name != "best_of":
            raise Unsupported(f"{name} is not supported by this server, got {shorten(value)}; leave it out", name)
    return given


def shorten(value: object) -> str:
    """`value` as JSON, at most 80 characters."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, msgspec.EncodeError):
        text = "a value that JSON cannot hold"
    return text if len(text) <= 80 else text[:79] + "…"


def _explain(data: bytes, message: str) -> BadRequest:
    what, _, at = message.rpartition(" - at `")
    if not what:
        what, at = message, ""
    at = at.removesuffix("`")
    path = at.removeprefix("key in ").removeprefix("$").lstrip(".")
    missing = _MISSING.search(message)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return BadRequest(f"{name} is missing; it is required", name)
    if not path:
        return BadRequest(f"the body: {what}")
    if at.startswith("key in "):
        return BadRequest(f"{path}: a key is wrong: {what}", path)
    found, value = _look_up(data, at.removeprefix("$"))
    return BadRequest(f"{path}: {what}" + (f", got the value {shorten(value)}" if found else ""), path)


def _look_up(data: bytes, path: str) -> tuple[bool, object]:
    """The value at `path` of the body, for the message. False where the path has no single answer."""
    try:
        value: Any = msgspec.json.decode(data)
        for name, index in _STEP.findall(path):
            if not name and not index:
                return False, None
            value = value[name] if name else value[int(index)]
    except (msgspec.DecodeError, ValueError, RecursionError, LookupError, TypeError):
        return False, None
    return True, value
