"""From a validated body to what the router runs (`SamplingParams`) and how the answer is shaped (`AnswerOptions`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TypeVar

import msgspec

from ..core.errors import BadRequest, ModelNotFound
from ..core.ids import IdSource
from ..protocol.sampling import MAX_TOKENS, SamplingParams, check
from .bodies import ChatBody, SamplingFields, shorten
from .config import GatewayConfig
from .errors import ContextLengthExceeded, Unsupported
from .urgency import Urgency

DEFAULT_COMPLETION_TOKENS = 16
_SEED_MASK = 2**63 - 1

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What the client wants to see of the tokens. `top_logprobs` None: no logprobs."""

    model: str
    is_stream: bool = False
    has_usage: bool = False
    has_continuous_usage: bool = False
    stop: tuple[str, ...] = ()
    includes_stop: bool = False
    skips_special_tokens: bool = True
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """One HTTP call: every prompt is one router request with the same sampling."""

    prompts: list[list[int]]
    params: SamplingParams
    options: AnswerOptions
    cache_salt: str
    has_own_seed: bool  # the client gave the seed
    session: str = ""  # whose conversation it is, for the router
    urgency: Urgency = field(default_factory=Urgency)


def check_model(name: str, config: GatewayConfig) -> None:
    if name not in config.model_names:
        raise ModelNotFound(
            f"the model {shorten(name)} does not exist here; this server has {config.model_name}", "model"
        )


def chat_logprobs(body: ChatBody) -> int | None:
    """The number of alternatives; raises BadRequest for top_logprobs without logprobs."""
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest(f"top_logprobs: {body.top_logprobs} needs logprobs: true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def chat_max_tokens(body: ChatBody) -> tuple[str, int | None]:
    """The bound the client set, with the name it used. The newer name wins."""
    if body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def answer_options(body: SamplingFields, top_logprobs: int | None) -> AnswerOptions:
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options needs stream: true", "stream_options")
    options = body.stream_options
    return AnswerOptions(
        model=body.model,
        is_stream=bool(body.stream),
        has_usage=bool(options and options.include_usage),
        has_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        stop=_stop_strings(body.stop),
        includes_stop=bool(body.include_stop_str_in_output),
        skips_special_tokens=body.skip_special_tokens is not False,
        top_logprobs=top_logprobs,
    )


def sampling_params(
    body: SamplingFields, max_tokens: int, top_logprobs: int | None, vocab_size: int, ids: IdSource
) -> SamplingParams:
    """The body's sampling in the engine's terms; raises BadRequest that names the field."""
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        raise BadRequest(f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens allowed", "min_tokens")
    seed = int.from_bytes(ids.token(8), "little") if body.seed is None else body.seed
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(body.min_tokens, 0),
        n=_or(body.n, 1),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, _or(body.top_k, 0)),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias, vocab_size),
        seed=seed & _SEED_MASK,
        logprobs=top_logprobs,
        stop_token_ids=_stop_token_ids(body.stop_token_ids, vocab_size),
        ignore_eos=bool(body.ignore_eos),
    )
    try:
        return check(params)
    except msgspec.ValidationError as err:
        raise BadRequest(f"sampling: {err}") from None


def fit_window(num_prompt_tokens: int, prompt_name: str, wanted: int | None, name: str, window: int) -> int:
    """How many tokens may be generated: `wanted`, or the rest of the window. Raises ContextLengthExceeded."""
    room = window - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens, the context window of {window} must hold at least one more; "
            "shorten the prompt",
            prompt_name,
        )
    if wanted is None:
        return min(room, MAX_TOKENS)
    if wanted > room:
        raise ContextLengthExceeded(
            f"{name}: {num_prompt_tokens} prompt tokens + {wanted} is more than the context window of {window} tokens; "
            f"ask for at most {room}",
            name,
        )
    return wanted


def check_best_of(best_of: object, n: int) -> None:
    if best_of is not None and (type(best_of) is not int or best_of != n):
        raise Unsupported(
            f"best_of is not supported by this server, got {shorten(best_of)} with n={n}; leave it out", "best_of"
        )


def check_amount(num_prompts: int, params: SamplingParams, config: GatewayConfig) -> None:
    """Bound n, and what n x max_tokens x logprobs may hold in memory."""
    if params.n > config.limits.max_n:
        raise BadRequest(f"n: {params.n} is more than this server's bound of {config.limits.max_n}", "n")
    if params.logprobs is None:
        return
    entries = num_prompts * params.n * params.max_tokens * (1 + params.logprobs)
    bound = config.limits.max_logprob_entries
    if entries > bound:
        raise BadRequest(
            f"logprobs: prompts x n x max_tokens x (1 + alternatives) is {entries}, the bound is {bound}; lower one",
            "logprobs",
        )


def scoped_salt(tenant: str, salt: str | None) -> str:
    """The cache namespace: that of the key's owner, and within it the one the client named."""
    return f"{tenant}:{salt}" if salt else tenant


def session_key(tenant: str, header: str, user: str | None) -> str:
    """A fixed-size name of the conversation, apart from other tenants' ones; empty where the client names none."""
    named = header or user or ""
    if not named:
        return ""
    parts = (tenant.encode(), named.encode(errors="replace"))
    return blake2b(b"".join(len(part).to_bytes(4, "little") + part for part in parts), digest_size=16).hexdigest()


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < vocab_size):
            raise BadRequest(
                f"logit_bias: {shorten(key)} is not a token id of this model (0 to {vocab_size - 1})", "logit_bias"
            )
        assert math.isfinite(value)  # the decoder's bounds refuse the rest
        result[int(key)] = value
    return result


def _stop_token_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    for token_id in ids or ():
        if token_id >= vocab_size:
            raise BadRequest(
                f"stop_token_ids: {token_id} is not a token id of this model (0 to {vocab_size - 1})", "stop_token_ids"
            )
    return tuple(dict.fromkeys(ids or ()))
