"""Class, priority, tier and targets on their way from HTTP to the router, and refusals on their way back."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from penstock.core.errors import TooManyRequests
from penstock.router.interface import ClassStatus

COMPLETION = {"model": "toy", "prompt": "hi", "max_tokens": 1}


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        async def whole() -> None:
            await test(**fixtures)

        asyncio.run(whole())

    return run


async def asked(served, headers=None, **body):
    status, answer = await served.post("/v1/completions", {**COMPLETION, **body}, headers=headers or {})
    assert status == 200, answer
    return served.router.only.request


@pytest.mark.parametrize(
    ("headers", "body", "class_name", "steps"),
    [
        ({}, {}, "", 0),
        ({"X-Penstock-Class": "batch"}, {"priority": -1}, "batch", -1),
        ({}, {"priority": -3, "service_tier": "flex"}, "", -3),
        ({}, {"service_tier": "priority"}, "", -1024),
        ({}, {"service_tier": "flex"}, "", 1024),
        ({}, {"service_tier": "auto"}, "", 0),
        ({}, {"priority": None}, "", 0),
        ({}, {"priority": 2**31 - 1}, "", 1024),
    ],
)
@in_loop
async def test_class_is_what_the_client_says(serve, headers, body, class_name, steps):
    async with serve() as served:
        request = await asked(served, headers, **body)
        assert (request.class_name, request.priority) == (class_name, steps)
        assert (request.target_ttft_s, request.target_tpot_s, request.tenant) == (None, None, "")


@in_loop
async def test_chat_says_it_too_and_targets_are_seconds(serve):
    async with serve() as served:
        body = {"model": "toy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        headers = {"X-Penstock-TTFT-Target": "0.5", "X-Penstock-TPOT-Target": "2e-2", "X-Penstock-Class": "interactive"}
        status, answer = await served.post("/v1/chat/completions", body, headers=headers)
        assert status == 200, answer
        request = served.router.only.request
        assert (request.class_name, request.target_ttft_s, request.target_tpot_s) == ("interactive", 0.5, 0.02)


@pytest.mark.parametrize("header", ["X-Penstock-TTFT-Target", "X-Penstock-TPOT-Target"])
@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9", "1s"])
@in_loop
async def test_bad_target_is_refused_by_the_headers_name(serve, header, value):
    async with serve() as served:
        status, answer = await served.post("/v1/completions", COMPLETION, headers={header: value})
        assert status == 400
        assert (answer["error"]["param"], answer["error"]["type"]) == (header, "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "param"),
    [({"priority": "high"}, "priority"), ({"priority": 2**40}, "priority"), ({"service_tier": "gold"}, "service_tier")],
)
@in_loop
async def test_bad_body_field_is_refused_by_name(serve, body, param):
    async with serve() as served:
        status, answer = await served.post("/v1/completions", {**COMPLETION, **body})
        assert (status, answer["error"]["param"]) == (400, param)


@in_loop
async def test_overlong_class_is_refused(serve):
    async with serve() as served:
        status, answer = await served.post("/v1/completions", COMPLETION, headers={"X-Penstock-Class": "c" * 65})
        assert (status, answer["error"]["param"]) == (400, "X-Penstock-Class")


@in_loop
async def test_owner_of_a_key_is_the_tenant(serve):
    async with serve(config={"api_keys": ("one", "two")}) as served:
        for key in ("one", "two", "one"):
            status, answer = await served.post(
                "/v1/completions", COMPLETION, headers={"Authorization": f"Bearer {key}"}
            )
            assert status == 200, answer
        tenants = [stream.request.tenant for stream in served.router.streams]
        assert tenants[0] == tenants[2] != tenants[1]
        assert all(tenants)
        assert "one" not in tenants


@pytest.mark.parametrize("is_stream", [False, True])
@in_loop
async def test_refusal_is_429_with_the_time_to_come_again(serve, is_stream):
    async with serve(refuse=TooManyRequests("too late; send it again in 7 s", 7)) as served:
        body = {**COMPLETION, "stream": is_stream}
        async with served.http.post(served.url + "/v1/completions", json=body) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "7"
            assert "x-should-retry" not in response.headers
            error = (await response.json())["error"]
        assert error == {
            "message": "too late; send it again in 7 s",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }


@in_loop
async def test_request_shed_while_it_waits_is_429_too(serve):
    error = TooManyRequests("it waited 2 s; send it again in 3 s", 3)
    async with serve(fail_before=0, error=error) as served:
        for is_stream in (False, True):
            body = {**COMPLETION, "stream": is_stream}
            async with served.http.post(served.url + "/v1/completions", json=body) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "3")


@in_loop
async def test_metrics_count_by_class(serve):
    async with serve() as served:
        status = served.router.status
        book = ClassStatus("batch", 2, {"forecast": 3, "late": 1}, ttft_met=5, tpot_missed=4)

        def with_classes():
            return msgspec.structs.replace(status(), classes=[book])

        served.router.status = with_classes
        async with served.http.get(served.url + "/metrics") as response:
            text = await response.text()
    for line in (
        'penstock_class_queued_requests{class="batch"} 2.0',
        'penstock_refused_requests_total{class="batch",reason="forecast"} 3.0',
        'penstock_refused_requests_total{class="batch",reason="late"} 1.0',
        'penstock_target_requests_total{class="batch",of="ttft",result="met"} 5.0',
        'penstock_target_requests_total{class="batch",of="tpot",result="missed"} 4.0',
    ):
        assert line in text
