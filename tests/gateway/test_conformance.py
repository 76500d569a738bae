"""Every kind of answer against OpenAI's own description of its API."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

LOGPROBS = {"/v1/completions": {"logprobs": 2}, "/v1/chat/completions": {"logprobs": True, "top_logprobs": 2}}
SCHEMAS = {
    "/v1/completions": ("CreateCompletionResponse", "CreateCompletionResponse"),
    "/v1/chat/completions": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
}
VARIANTS: list[dict[str, Any]] = [{}, {"n": 2}, {"stop": "quick"}, {"max_tokens": 1}, {"temperature": 0}]


@pytest.mark.parametrize("path", list(SCHEMAS))
@pytest.mark.parametrize("has_logprobs", [False, True])
def test_answers_and_chunks_follow_the_schema(serve: Any, openai_schema: Any, path: str, has_logprobs: bool) -> None:
    whole, chunked = SCHEMAS[path]
    extra = LOGPROBS[path] if has_logprobs else {}
    base = {"model": "toy"} | ({"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"})

    async def run() -> None:
        async with serve(reply="a quick é€ fox") as served:
            for variant in VARIANTS:
                status, body = await served.post(path, base | {"max_tokens": 12} | extra | variant)
                assert status == 200
                openai_schema(whole, body)
                options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
                *chunks, done = await served.events(path, **({"max_tokens": 12} | extra | variant | options))
                assert done == "[DONE]"
                for chunk in chunks:
                    openai_schema(chunked, _with_reason(chunk) if chunked == whole else chunk)

    asyncio.run(run())


def _with_reason(chunk: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's completion chunks have finish_reason null until the last; its description forgets to say so."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    return chunk | {"choices": choices}


def test_models_follow_the_schema(serve: Any, openai_schema: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            async with served.http.get(served.url + "/v1/models") as response:
                openai_schema("ListModelsResponse", await response.json())
            async with served.http.get(served.url + "/v1/models/toy") as response:
                openai_schema("Model", await response.json())

    asyncio.run(run())


@pytest.mark.parametrize("body", [{}, {"model": "x", "prompt": ""}, {"model": "toy", "prompt": "x", "n": -1}])
def test_errors_follow_the_schema(serve: Any, openai_schema: Any, body: dict[str, Any]) -> None:
    async def run() -> None:
        async with serve() as served:
            status, answer = await served.post("/v1/completions", body)
            assert status >= 400
            openai_schema("ErrorResponse", answer)

    asyncio.run(run())


def test_schema_check_finds_a_planted_fault(openai_schema: Any) -> None:
    with pytest.raises(Exception, match="finish_reason"):
        openai_schema("CreateCompletionResponse", _completion({"index": 0, "text": "", "logprobs": None}))


def _completion(choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "object": "text_completion", "created": 1, "model": "toy", "choices": [choice]}
