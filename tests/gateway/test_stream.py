from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from penstock.core.errors import NodeLost, Overloaded


def test_stream_completion_chunks_join_to_the_whole(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            *chunks, done = await served.events("/v1/completions", max_tokens=12)
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The quick br"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 11 + ["length"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert all("usage" not in chunk for chunk in chunks)

    asyncio.run(run())


def test_stream_chat_opens_each_choice_with_its_role(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            *chunks, _ = await served.events("/v1/chat/completions", max_tokens=3, n=2)
        for index in (0, 1):
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in choices) == "The"
            assert choices[-1]["finish_reason"] == "length"
            assert all(choice["finish_reason"] is None for choice in choices[:-1])

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_usage_comes_last_and_is_null_before(serve: Any, path: str) -> None:
    async def run() -> None:
        async with serve() as served:
            *chunks, last, done = await served.events(path, max_tokens=5, stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        assert last["penstock"]["transferred_blocks"] == 2

    asyncio.run(run())


def test_stream_continuous_usage_counts_up(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            options = {"include_usage": True, "continuous_usage_stats": True}
            *chunks, _ = await served.events("/v1/completions", max_tokens=3, stream_options=options)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]

    asyncio.run(run())


def test_stream_stop_string_never_leaks(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            *chunks, usage, _ = await served.events(
                "/v1/completions", max_tokens=40, stop="brown", logprobs=0, stream_options={"include_usage": True}
            )
            assert served.router.only.cancelled
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The quick "
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        assert "".join(tokens) == "The quick "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"]["completion_tokens"] == len("The quick brown")

    asyncio.run(run())


def test_stream_character_is_never_cut(serve: Any) -> None:
    async def run() -> None:
        async with serve(reply="é€😀") as served:
            *chunks, _ = await served.events("/v1/completions", max_tokens=9)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["é", "€", "😀"]

    asyncio.run(run())


def test_stream_of_many_prompts_covers_every_index(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            *chunks, _ = await served.events("/v1/completions", prompt=["a", "b", "c"], n=2, max_tokens=4)
        texts = dict.fromkeys(range(6), "")
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert set(texts.values()) == {"The "}

    asyncio.run(run())


def test_stream_headers_tell_proxies_not_to_buffer(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            body = {"model": "toy", "prompt": "x", "stream": True}
            async with served.http.post(
                served.url + "/v1/completions", json=body, headers={"X-Request-Id": "my-id"}
            ) as response:
                assert response.headers["X-Accel-Buffering"] == "no"
                assert "no-cache" in response.headers["Cache-Control"]
                assert response.headers["X-Request-Id"] == "my-id"
                await response.read()

    asyncio.run(run())


def test_stream_error_before_first_token_has_its_status(serve: Any) -> None:
    async def run() -> None:
        async with serve(fail_before=0, error=Overloaded("no room")) as served:
            body = {"model": "toy", "prompt": "x", "stream": True}
            async with served.http.post(served.url + "/v1/completions", json=body) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                assert "x-should-retry" not in response.headers
                assert (await response.json())["error"]["code"] == "overloaded"

    asyncio.run(run())


def test_stream_error_after_start_is_one_event_without_done(serve: Any) -> None:
    async def run() -> None:
        async with serve(fail_before=3, error=NodeLost("decode-1 at tcp://10.0.0.7:5000 is lost")) as served:
            *chunks, last = await served.events("/v1/chat/completions", max_tokens=9)
        assert "[DONE]" not in chunks
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "The"
        assert last["error"] == {
            "message": "decode-1 at <address> is lost",
            "type": "server_error",
            "param": None,
            "code": "node_lost",
        }

    asyncio.run(run())


def test_stream_unexpected_bug_after_start_is_an_error_event(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serve(fail_before=3, error=RuntimeError("secret in /home/user/x.py at 0x7f00dead")) as served:
            *_, last = await served.events("/v1/completions", max_tokens=9)
        assert last["error"]["code"] == "internal_error"
        assert "secret" not in json.dumps(last)

    asyncio.run(run())


def test_stream_silent_start_sends_pings(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=0, config={"ping_interval_s": 0.01}) as served:
            body = {"model": "toy", "prompt": "x", "stream": True, "max_tokens": 2}
            async with served.http.post(served.url + "/v1/completions", json=body) as response:
                assert await response.content.readuntil(b"\n\n") == b": ping\n\n"
                served.router.release()
                rest = await response.read()
            assert rest.endswith(b"data: [DONE]\n\n")

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("hold_before", [0, 5])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_client_that_leaves_cancels_the_request(serve: Any, path: str, hold_before: int, is_stream: bool) -> None:
    body = {"model": "toy", "stream": is_stream, "max_tokens": 9}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}

    async def run() -> None:
        async with serve(hold_before=hold_before) as served:
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(_request(path, body))
            await served.router.entered.wait()
            writer.close()
            await asyncio.wait_for(served.router.only.wake.wait(), 10)
            assert served.router.only.cancelled
            await asyncio.wait_for(served.gateway.running.wait_empty(), 10)
            assert b"penstock_client_disconnects_total 1.0" in served.gateway.metrics.render()
            assert served.gateway.admission.active == 0

    asyncio.run(run())


def test_client_that_leaves_many_prompts_cancels_all(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=1) as served:
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(_request("/v1/completions", {"model": "toy", "prompt": ["a", "b", "c"]}))
            await served.router.entered.wait()
            writer.close()
            await asyncio.wait_for(served.gateway.running.wait_empty(), 10)
            assert [stream.cancelled for stream in served.router.streams] == [True] * 3

    asyncio.run(run())


def test_slow_reader_is_cut_while_others_go_on(serve: Any) -> None:
    async def run() -> None:
        settings = {"config": {"max_model_len": 300_000}, "limits": {"write_timeout_s": 0.2}}
        async with serve(**settings) as served:
            loop = asyncio.get_running_loop()
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                slow.setblocking(False)
                await loop.sock_connect(slow, ("127.0.0.1", served.port))
                body = {"model": "toy", "prompt": "x", "stream": True, "max_tokens": 200_000}
                await loop.sock_sendall(slow, _request("/v1/completions", body))
                await served.router.entered.wait()
                stalled = served.router.streams[0]
                *chunks, _ = await served.events("/v1/completions", max_tokens=50)
                assert len(chunks) == 50
                await asyncio.wait_for(stalled.wake.wait(), 30)
            assert stalled.cancelled
            assert stalled.sent < 200_000
            await asyncio.wait_for(served.gateway.running.wait_empty(), 10)
            assert b"penstock_slow_clients_cut_total 1.0" in served.gateway.metrics.render()

    asyncio.run(run())


def _request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
