from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import aiohttp
import pytest

from penstock.core.errors import ConfigError
from penstock.gateway.server import ServeOptions, check_bind, drain, serve


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_bind_on_loopback_needs_no_key(host: str) -> None:
    check_bind(ServeOptions(host=host), has_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box", ""])
def test_bind_beyond_loopback_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_bind(ServeOptions(host=host), has_keys=False)
    check_bind(ServeOptions(host=host), has_keys=True)
    check_bind(ServeOptions(host=host, allows_open_bind=True), has_keys=False)


def test_drain_refuses_new_work_and_lets_streams_finish(serve: Any) -> None:
    async def run() -> None:
        async with serve(hold_before=2) as served:
            stream = asyncio.create_task(served.events("/v1/completions", max_tokens=5))
            await served.router.entered.wait()
            draining = asyncio.create_task(drain(served.gateway, 30))
            await asyncio.sleep(0)
            assert served.router.is_draining
            async with served.http.get(served.url + "/ready") as response:
                assert response.status == 503
            async with served.http.get(served.url + "/live") as response:
                assert response.status == 200
            status, body = await served.post("/v1/completions", {"model": "toy", "prompt": "x"})
            assert (status, body["error"]["code"]) == (503, "unavailable")
            served.router.release()
            await draining
            assert (await stream)[-1] == "[DONE]"

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [True, False])
def test_drain_ends_what_outlives_the_grace_with_an_error(serve: Any, is_stream: bool) -> None:
    async def run() -> None:
        async with serve(hold_before=2) as served:
            if is_stream:
                call = asyncio.create_task(served.events("/v1/completions", max_tokens=5))
            else:
                call = asyncio.create_task(served.post("/v1/completions", {"model": "toy", "prompt": "x"}))
            await served.router.entered.wait()
            await drain(served.gateway, 0.01)
            last = (await call)[-1]
            assert last["error"]["code"] == "unavailable"
            assert served.gateway.running.count == 0

    asyncio.run(run())


def test_serve_ends_on_sigterm_after_the_stream(serve: Any) -> None:
    async def run() -> None:
        async with serve() as other:  # for its application only; a second server runs it
            app = other.app
            port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            server = asyncio.create_task(_serve_copy(app, port))
            url = f"http://127.0.0.1:{await port}"
            async with aiohttp.ClientSession() as http, http.get(url + "/live") as response:
                assert response.status == 200
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(server, 10)
            assert other.router.is_draining

    asyncio.run(run())


async def _serve_copy(app: Any, port: asyncio.Future[int]) -> None:
    await serve(app, ServeOptions(port=0, grace_s=1), on_bound=port.set_result)
