"""The official Python client against the gateway: what it parses is what users get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from penstock.core.errors import NodeLost, Overloaded


@asynccontextmanager
async def _client(served: Any, key: str = "none", retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=key, max_retries=retries) as client:
        yield client


MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_client_reads_completion_and_chat(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served, _client(served) as client:
            completion = await client.completions.create(model="toy", prompt="hi", max_tokens=9, logprobs=2, n=2)
            assert [choice.text for choice in completion.choices] == ["The quick"] * 2
            assert completion.choices[0].logprobs is not None
            assert completion.choices[0].logprobs.tokens == list("The quick")
            chat = await client.chat.completions.create(
                model="toy", messages=MESSAGES, max_completion_tokens=3, logprobs=True, top_logprobs=1
            )
            assert chat.choices[0].message.content == "The"
            assert chat.choices[0].logprobs is not None
            assert chat.choices[0].logprobs.content is not None
            assert [entry.token for entry in chat.choices[0].logprobs.content] == ["T", "h", "e"]
            assert chat.usage is not None
            assert chat.usage.prompt_tokens_details is not None
            assert chat.usage.prompt_tokens_details.cached_tokens == 4

    asyncio.run(run())


def test_client_reads_streams(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served, _client(served) as client:
            stream = await client.chat.completions.create(
                model="toy", messages=MESSAGES, max_tokens=9, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The quick"
            assert chunks[0].choices[0].delta.role == "assistant"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 9
            texts = await client.completions.create(model="toy", prompt="hi", max_tokens=9, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in texts]) == "The quick"

    asyncio.run(run())


def test_client_sends_extras_in_extra_body(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served, _client(served) as client:
            extra = {"top_k": 5, "ignore_eos": True, "min_tokens": 2}
            await client.completions.create(model="toy", prompt="hi", extra_body=extra)
            params = served.router.only.request.params
            assert (params.top_k, params.ignore_eos, params.min_tokens) == (5, True, 2)

    asyncio.run(run())


def test_client_lists_models(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served, _client(served) as client:
            assert [model.id async for model in client.models.list()] == ["toy", "toy-alias"]
            assert (await client.models.retrieve("toy")).id == "toy"

    asyncio.run(run())


def test_client_maps_errors_to_its_classes(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"api_keys": ("right",)}) as served:
            async with _client(served, "wrong") as client:
                with pytest.raises(openai.AuthenticationError):
                    await client.models.list()
            async with _client(served, "right") as client:
                with pytest.raises(openai.NotFoundError) as missing:
                    await client.completions.create(model="other", prompt="x")
                assert missing.value.code == "model_not_found"
                with pytest.raises(openai.BadRequestError) as refused:
                    await client.completions.create(model="toy", prompt="x", temperature=-1)
                assert refused.value.param == "temperature"
                assert "-1" in refused.value.message
                served.router.refuse = Overloaded("full")
                with pytest.raises(openai.InternalServerError) as full:
                    await client.completions.create(model="toy", prompt="x")
                assert full.value.status_code == 503

    asyncio.run(run())


def test_client_raises_on_error_in_the_stream(serve: Any) -> None:
    async def run() -> None:
        async with serve(fail_before=3, error=NodeLost("gone")) as served, _client(served) as client:
            stream = await client.completions.create(model="toy", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="gone"):
                async for _ in stream:
                    pass

    asyncio.run(run())


def test_client_does_not_repeat_what_has_cost_tokens(serve: Any) -> None:
    async def run() -> None:
        async with serve(fail_before=3, error=NodeLost("gone")) as served, _client(served, retries=3) as client:
            with pytest.raises(openai.InternalServerError):
                await client.completions.create(model="toy", prompt="x")
            assert len(served.router.streams) == 1

    asyncio.run(run())


def test_client_that_closes_its_stream_cancels(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=3) as served, _client(served) as client:
            stream = await client.completions.create(model="toy", prompt="x", stream=True)
            assert (await anext(aiter(stream))).choices[0].text == "T"
            await stream.close()
            await asyncio.wait_for(served.router.only.wake.wait(), 10)
            assert served.router.only.cancelled

    asyncio.run(run())
