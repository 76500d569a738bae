from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from penstock.core.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NodeLost,
    Overloaded,
    ServeError,
    Unavailable,
)
from penstock.gateway.errors import MAX_MESSAGE_CHARS, clean_message, error_body

UNSAFE = re.compile(r"0x[0-9a-f]{4}|/(home|usr|opt|tmp|root|work)/|Traceback|\.py\b|\d+\.\d+\.\d+\.\d+")
POST_ROUTES = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


def assert_error(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["code"], str)
    assert not UNSAFE.search(json.dumps(body)), body
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("lost tcp://10.0.0.1:99 now", "lost <address> now"),
        ("lost 10.0.0.1:99 now", "lost <address> now"),
        ("object at 0x7f3a2b", "object at <address>"),
        ("open '/home/me/model.gguf' failed", "open '<path>' failed"),
        ("bad\nTraceback (most recent call last):\n  File x", "bad\n<traceback>"),
        ("1/2 of the blocks, n x m", "1/2 of the blocks, n x m"),
        ("0.5 and 7/8/9", "0.5 and 7/8/9"),
        ("x" * 10_000, "x" * (MAX_MESSAGE_CHARS - 1) + "…"),
    ],
)
def test_clean_message_hides_what_is_ours(text: str, cleaned: str) -> None:
    assert clean_message(text) == cleaned


def test_error_body_of_internal_error_says_nothing() -> None:
    assert "secret" not in json.dumps(error_body(InternalError("secret")))


@pytest.mark.parametrize("path", POST_ROUTES)
@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b"{", {}, 400, "bad_request"),
        (b"", {}, 400, "bad_request"),
        (b"[]", {}, 400, "bad_request"),
        (b"\xff\xfe", {}, 400, "bad_request"),
        (b'{"model": "\xff"}', {}, 400, "bad_request"),
        (b"[" * 100_000, {}, 400, "bad_request"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        (b" " * 5000, {}, 413, "request_too_large"),
    ],
)
def test_post_route_with_broken_body_has_error_body(
    serve: Any, path: str, data: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    async def run() -> None:
        limits = {"max_body_bytes": 4096} if status == 413 else {}
        async with serve(limits=limits) as served:
            sent = {"Content-Type": "application/json"} | headers
            async with served.http.post(served.url + path, data=data, headers=sent) as response:
                assert response.status == status
                assert assert_error(await response.json())["code"] == code
                assert response.headers["X-Request-Id"]

    asyncio.run(run())


def test_chunked_body_over_the_bound_is_refused(serve: Any) -> None:
    async def pieces() -> Any:
        for _ in range(64):
            yield b" " * 4096

    async def run() -> None:
        async with (
            serve(limits={"max_body_bytes": 8192}) as served,
            served.http.post(
                served.url + "/tokenize", data=pieces(), headers={"Content-Type": "application/json"}
            ) as response,
        ):
            assert response.status == 413
            assert_error(await response.json())

    asyncio.run(run())


def test_body_that_never_comes_times_out(serve: Any) -> None:
    async def run() -> None:
        async with serve(limits={"body_timeout_s": 0.05}) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
            )
            answer = await asyncio.wait_for(reader.read(), 10)  # to the end: the connection is closed
            writer.close()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert_error(json.loads(answer.partition(b"\r\n\r\n")[2]))
            assert served.gateway.admission.active == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/home/user/.ssh/id", 404, "not_found"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_wrong_url_or_method_has_error_body(serve: Any, method: str, path: str, status: int, code: str) -> None:
    async def run() -> None:
        async with serve() as served, served.http.request(method, served.url + path) as response:
            assert response.status == status
            assert assert_error(await response.json())["code"] == code
            assert (status == 405) == ("Allow" in response.headers)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "status", "retries"),
    [
        (Overloaded("full"), 503, True),
        (Unavailable("nobody"), 503, True),
        (BadRequest("too long", "prompt"), 400, False),
        (InternalError("bug"), 500, False),
        (RuntimeError("at 0xdeadbeef in /opt/x.py"), 500, False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_refusal_by_the_router_becomes_its_status(
    serve: Any, path: str, error: Exception, status: int, retries: bool
) -> None:
    async def run() -> None:
        async with serve(refuse=error) as served:
            async with served.http.post(served.url + path, json=_body(path)) as response:
                assert response.status == status
                assert_error(await response.json())
                assert ("Retry-After" in response.headers) == retries
                assert "x-should-retry" not in response.headers
            assert served.gateway.running.count == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "error", [NodeLost("gone"), DeadlineExceeded("late"), Overloaded("full"), Cancelled("by hand")]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_failure_after_tokens_tells_clients_not_to_retry(serve: Any, path: str, error: ServeError) -> None:
    async def run() -> None:
        async with serve(fail_before=2, error=error) as served:
            body = _body(path)
            async with served.http.post(served.url + path, json=body) as response:
                assert response.status == error.status
                assert response.headers["x-should-retry"] == "false"
                assert assert_error(await response.json())["code"] == error.code

    asyncio.run(run())


def test_deadline_before_any_token_is_504_without_retry(serve: Any) -> None:
    async def run() -> None:
        async with serve(fail_before=0, error=DeadlineExceeded("late")) as served:
            body = _body("")
            async with served.http.post(served.url + "/v1/completions", json=body) as response:
                assert response.status == 504
                assert response.headers["x-should-retry"] == "false"

    asyncio.run(run())


def test_one_refused_prompt_of_many_cancels_the_others(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=0) as served:
            submit = served.router.submit

            def refuse_third(request: Any) -> Any:
                if len(served.router.streams) == 2:
                    raise Overloaded("full")
                return submit(request)

            served.router.submit = refuse_third
            status, _ = await served.post("/v1/completions", {"model": "toy", "prompt": ["a", "b", "c"]})
            assert status == 503
            assert [stream.cancelled for stream in served.router.streams] == [True, True]

    asyncio.run(run())


def test_request_over_the_concurrency_bound_is_refused(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=0, limits={"max_concurrent_requests": 1}) as served:
            first = asyncio.create_task(served.completion())
            await served.router.entered.wait()
            status, body = await served.post("/v1/completions", _body(""))
            assert status == 503
            assert body["error"]["code"] == "overloaded"
            served.router.release()
            await first
            await served.completion()

    asyncio.run(run())


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: x\r\n" + b"h: x\r\n" * 300 + b"\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_not_http_has_error_body_and_ends_the_connection(serve: Any, raw: bytes) -> None:
    async def run() -> None:
        async with serve() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(raw)
            head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
            writer.close()
            assert head.split()[1] in (b"400", b"415")
            assert b"aiohttp" not in head
            assert_error(json.loads(body.splitlines()[-1]))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("header", "echoed"),
    [("abc-1.2:x_y", "abc-1.2:x_y"), ("a b<c>", "abc"), ("x" * 500, "x" * 128), ("/etc/passwd", "etcpasswd")],
)
def test_request_id_is_echoed_cleaned(serve: Any, header: str, echoed: str) -> None:
    async def run() -> None:
        async with serve() as served:
            for path in ("/version", "/nothing"):
                async with served.http.get(served.url + path, headers={"X-Request-Id": header}) as response:
                    assert response.headers["X-Request-Id"] == echoed

    asyncio.run(run())


def _body(path: str) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {"model": "toy"} | said
