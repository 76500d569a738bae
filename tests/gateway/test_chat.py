from __future__ import annotations

import asyncio
from typing import Any

import pytest


def test_chat_answer_has_openai_shape(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.chat(max_tokens=3)
            assert bytes(served.router.only.request.prompt_ids) == b"user: hi\nassistant: "
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": "The", "refusal": None}
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"] is None
        assert answer["object"] == "chat.completion"
        assert answer["model"] == "toy"

    asyncio.run(run())


def test_chat_without_max_tokens_may_fill_the_window(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"max_model_len": 50}) as served:
            answer = await served.chat()
            assert answer["usage"]["total_tokens"] == 50

    asyncio.run(run())


def test_chat_window_is_what_the_workers_can_hold(serve: Any) -> None:
    async def run() -> None:
        async with serve(max_sequence_tokens=40) as served:
            assert (await served.chat())["usage"]["total_tokens"] == 40

    asyncio.run(run())


def test_chat_max_completion_tokens_wins(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            assert (await served.chat(max_tokens=9, max_completion_tokens=2))["usage"]["completion_tokens"] == 2

    asyncio.run(run())


def test_chat_text_parts_and_roles_reach_the_template(serve: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "name": "bot"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]

    async def run() -> None:
        async with serve() as served:
            await served.chat(messages=messages, max_tokens=1)
            text = bytes(served.router.only.request.prompt_ids).decode()
        assert text == "system: be brief\nuser: a\nb\nassistant: c\ntool: d\nassistant: "

    asyncio.run(run())


def test_chat_logprobs_carry_bytes_and_alternatives(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="é!") as served:
            answer = await served.chat(max_tokens=3, logprobs=True, top_logprobs=2)
        entries = answer["choices"][0]["logprobs"]["content"]
        assert [entry["bytes"] for entry in entries] == [[0xC3], [0xA9], [0x21]]
        assert entries[2]["token"] == "!"
        assert [top["bytes"] for top in entries[2]["top_logprobs"]] == [[0x21], [0x22]]
        assert entries[2]["top_logprobs"][1]["logprob"] == -1.5

    asyncio.run(run())


def test_chat_logprobs_without_top_has_empty_alternatives(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            answer = await served.chat(max_tokens=2, logprobs=True)
        assert [entry["top_logprobs"] for entry in answer["choices"][0]["logprobs"]["content"]] == [[], []]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"stop_token_ids": [300]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"model": "other"}, "model"),
        ({"model": None}, "model"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
def test_chat_refused_value_names_its_field(serve: Any, extra: dict[str, Any], param: str) -> None:
    body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], **extra}

    async def run() -> None:
        async with serve() as served:
            status, answer = await served.post("/v1/chat/completions", body)
            assert status == (404 if extra.get("model") else 400), answer
            assert answer["error"]["param"] == param, answer
            assert served.router.streams == []

    asyncio.run(run())
