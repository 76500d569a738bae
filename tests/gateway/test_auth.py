from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.gateway.auth import OPEN_ROUTES, KeyRing

KEYS = {"api_keys": ("first-key", "second-key")}


def test_every_route_but_the_probes_needs_a_key(serve: Any) -> None:
    async def run() -> None:
        async with serve(config=KEYS) as served:
            seen = set()
            for route in served.app.router.routes():
                path = route.resource.canonical.replace("{model}", "toy")
                seen.add(path)
                async with served.http.request(route.method, served.url + path) as response:
                    assert (response.status == 401) == (path not in OPEN_ROUTES), path
                    if response.status == 401 and route.method != "HEAD":
                        assert (await response.json())["error"]["code"] == "invalid_api_key"
                        assert response.headers["WWW-Authenticate"] == "Bearer"
            assert seen > OPEN_ROUTES

    asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "//health",
        "/health/",
        "/%68ealth/../v1/models",
        "/v1//models",
        "/health%2f..%2fv1/models",
        "/live/../metrics",
    ],
)
def test_unusual_path_gives_nothing_away(serve: Any, path: str) -> None:
    async def run() -> None:
        async with serve(config=KEYS) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400")), answer

    asyncio.run(run())


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer first-ke", 401),
        ("Bearer first-key2", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("Bearer ", 401),
        ("Bearer " + "x" * 600, 401),
        ("Bearer schlüssel", 401),
    ],
)
def test_key_must_match_exactly(serve: Any, header: str, status: int) -> None:
    async def run() -> None:
        async with serve(config=KEYS) as served:
            headers = {"Authorization": header}
            async with served.http.get(served.url + "/v1/models", headers=headers) as response:
                assert response.status == status

    asyncio.run(run())


def test_metrics_answer_without_key_when_told_so(serve: Any) -> None:
    async def run() -> None:
        async with (
            serve(config=KEYS | {"has_open_metrics": True}) as served,
            served.http.get(served.url + "/metrics") as response,
        ):
            assert response.status == 200

    asyncio.run(run())


def test_keys_have_caches_of_their_own(serve: Any) -> None:
    async def run() -> None:
        async with serve(config=KEYS) as served:
            for key in KEYS["api_keys"]:
                headers = {"Authorization": f"Bearer {key}"}
                for salt in (None, "s"):
                    body = {"model": "toy", "prompt": "x", "cache_salt": salt}
                    await served.post("/v1/completions", body, headers=headers)
            salts = [stream.request.cache_salt for stream in served.router.streams]
            assert len(set(salts)) == 4
            assert not any(key in salt for key in KEYS["api_keys"] for salt in salts)

    asyncio.run(run())


def test_one_key_shares_one_cache() -> None:
    keys = KeyRing(["only"])
    assert not keys.has_tenants
    assert keys.tenant("only") is not None
    assert keys.tenant("other") is None
