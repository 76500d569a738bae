"""POST /tokenize and /detokenize, in vLLM's shapes: load tools align prompt lengths with them."""

from __future__ import annotations

import msgspec
from aiohttp import web

from ..core.errors import BadRequest
from .bodies import DetokenizeBody, TokenizeBody, decode
from .context import GATEWAY, Gateway
from .limits import read_body
from .requests import check_model


async def tokenize(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    with gateway.admission.slot():
        body = decode(await read_body(request, gateway.config.limits), TokenizeBody)
        if body.model is not None:
            check_model(body.model, gateway.config)
        ids = await _ids(gateway, body)
    tokenizer = gateway.tokenizer
    texts = [tokenizer.token_bytes(i).decode(errors="replace") for i in ids] if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": gateway.config.max_model_len, "tokens": ids, "token_strs": texts}
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    with gateway.admission.slot():
        body = decode(await read_body(request, gateway.config.limits), DetokenizeBody)
        if body.model is not None:
            check_model(body.model, gateway.config)
        ids = gateway.reader.check_ids(body.tokens, "tokens")
        text = await gateway.reader.to_text(ids)
    return web.Response(body=msgspec.json.encode({"prompt": text}), content_type="application/json")


async def _ids(gateway: Gateway, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("give either prompt or messages, and not both", "prompt")
    if body.messages is not None:
        return await gateway.reader.from_messages(body.messages, body.add_generation_prompt is not False)
    return await gateway.reader.from_text(body.prompt or "", body.add_special_tokens is not False)
