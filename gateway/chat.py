"""POST /v1/chat/completions."""

from __future__ import annotations

from aiohttp import web

from ..core.errors import BadRequest
from .answer import answer
from .bodies import ChatBody, check_refused, decode
from .call import current_call
from .context import GATEWAY, Gateway
from .generation import Generation
from .limits import read_body
from .requests import (
    GenerationJob,
    answer_options,
    chat_logprobs,
    chat_max_tokens,
    check_amount,
    check_best_of,
    check_model,
    fit_window,
    sampling_params,
    scoped_salt,
    session_key,
)
from .responses import ChatShape
from .urgency import urgency_of


async def chat_completions(request: web.Request) -> web.StreamResponse:
    gateway = request.app[GATEWAY]
    received_s = gateway.clock.now()
    with gateway.admission.slot():
        data = await read_body(request, gateway.config.limits)
        job = await _job(gateway, data)
        generation = Generation(gateway, job, f"chatcmpl-{gateway.ids.token(12).hex()}", received_s)
        shape = ChatShape(generation.answer_id, gateway.created(), job.options)
        return await answer(request, gateway, generation, shape)


async def _job(gateway: Gateway, data: bytes) -> GenerationJob:
    body = decode(data, ChatBody)
    check_model(body.model, gateway.config)
    check_best_of(check_refused(data)["best_of"], body.n or 1)
    if body.add_generation_prompt is False:
        raise BadRequest("add_generation_prompt: false is not supported by this endpoint", "add_generation_prompt")
    top_logprobs = chat_logprobs(body)
    options = answer_options(body, top_logprobs)
    ids = await gateway.reader.from_messages(body.messages, add_generation_prompt=True)
    name, wanted = chat_max_tokens(body)
    max_tokens = fit_window(len(ids), "messages", wanted, name, gateway.window())
    params = sampling_params(body, max_tokens, top_logprobs, gateway.tokenizer.vocab_size, gateway.ids)
    check_amount(1, params, gateway.config)
    call = current_call()
    salt = scoped_salt(call.tenant, body.cache_salt)
    session = session_key(call.tenant, call.session, body.user)
    return GenerationJob([ids], params, options, salt, body.seed is not None, session, urgency_of(call, body))
