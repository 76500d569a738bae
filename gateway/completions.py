"""POST /v1/completions."""

from __future__ import annotations

from aiohttp import web

from .answer import answer
from .bodies import CompletionBody, check_refused, decode
from .call import current_call
from .context import GATEWAY, Gateway
from .generation import Generation
from .limits import read_body
from .requests import (
    DEFAULT_COMPLETION_TOKENS,
    GenerationJob,
    answer_options,
    check_amount,
    check_best_of,
    check_model,
    fit_window,
    sampling_params,
    scoped_salt,
    session_key,
)
from .responses import CompletionShape
from .urgency import urgency_of


async def completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    received_s = gateway.clock.now()
    with gateway.admission.slot():
        data = await read_body(request, gateway.config.limits)
        job = await _job(gateway, data)
        generation = Generation(gateway, job, f"cmpl-{gateway.ids.token(12).hex()}", received_s)
        shape = CompletionShape(generation.answer_id, gateway.created(), job.options)
        return await answer(request, gateway, generation, shape)


async def _job(gateway: Gateway, data: bytes) -> GenerationJob:
    body = decode(data, CompletionBody)
    n = body.n or 1
    check_model(body.model, gateway.config)
    check_best_of(check_refused(data)["best_of"], n)
    options = answer_options(body, body.logprobs)
    wanted = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, wanted, body.logprobs, gateway.tokenizer.vocab_size, gateway.ids)
    prompts = await gateway.reader.from_prompt(body.prompt, n, body.add_special_tokens is not False)
    check_amount(len(prompts), params, gateway.config)
    window = gateway.window()
    for ids in prompts:
        fit_window(len(ids), "prompt", wanted, "max_tokens", window)
    call = current_call()
    salt = scoped_salt(call.tenant, body.cache_salt)
    session = session_key(call.tenant, call.session, body.user)
    return GenerationJob(prompts, params, options, salt, body.seed is not None, session, urgency_of(call, body))
