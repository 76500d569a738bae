from __future__ import annotations

import asyncio
from typing import Any

import pytest

import penstock
from penstock.core.clock import MonotonicClock
from penstock.core.errors import ConfigError
from penstock.core.ids import SeededIds
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig, Limits


async def _get(served: Any, path: str) -> tuple[int, Any]:
    async with served.http.get(served.url + path) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("is_ready", [True, False])
def test_probes_follow_the_cluster(serve: Any, is_ready: bool) -> None:
    async def run() -> None:
        async with serve(is_ready=is_ready) as served:
            statuses = [(await _get(served, path))[0] for path in ("/live", "/ready", "/health")]
            reason = (await _get(served, "/ready"))[1].get("reason")
        assert statuses == [200, 200, 200] if is_ready else [200, 503, 503]
        assert reason == (None if is_ready else "no decode worker")

    asyncio.run(run())


def test_models_lists_name_and_aliases(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            _, listed = await _get(served, "/v1/models")
            assert [model["id"] for model in listed["data"]] == ["toy", "toy-alias"]
            assert (await _get(served, "/v1/models/toy-alias"))[1] == listed["data"][1]
            assert listed["data"][0]["max_model_len"] == 4096

    asyncio.run(run())


def test_model_with_slashes_is_found_by_its_id(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"model_name": "org/toy-1B"}) as served:
            assert (await _get(served, "/v1/models/org/toy-1B"))[1]["id"] == "org/toy-1B"
            assert (await _get(served, "/v1/models/org%2Ftoy-1B"))[1]["id"] == "org/toy-1B"

    asyncio.run(run())


def test_version_is_the_packages(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            assert await _get(served, "/version") == (200, {"version": penstock.__version__})

    asyncio.run(run())


def test_status_shows_the_routers_view(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            _, status = await _get(served, "/status")
            assert status["workers"][0]["worker_id"] == "decode-0"
            assert status["workers"][0]["load"]["total_blocks"] == 100
            assert status["is_draining"] is False

    asyncio.run(run())


def test_reset_prefix_cache_reaches_the_router(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            async with served.http.post(served.url + "/reset_prefix_cache") as response:
                assert response.status == 200
            assert served.router.num_resets == 1

    asyncio.run(run())


def test_metrics_count_requests_tokens_and_workers(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            await served.completion(max_tokens=5)
            async with served.http.get(served.url + "/nothing"):
                pass
            async with served.http.get(served.url + "/metrics") as response:
                assert response.headers["Content-Type"].startswith("text/plain")
                text = await response.text()
        for line in (
            'penstock_requests_total{route="/v1/completions",status="200"} 1.0',
            'penstock_requests_total{route="unknown",status="404"} 1.0',
            "penstock_prompt_tokens_total 2.0",
            "penstock_generated_tokens_total 5.0",
            "penstock_cached_prompt_tokens_total 4.0",
            "penstock_ttft_seconds_count 1.0",
            "penstock_itl_seconds_count 4.0",
            "penstock_tpot_seconds_count 1.0",
            'penstock_ttft_phase_seconds_sum{phase="prefill"} 0.002',
            "penstock_running_generations 0.0",
            "penstock_ready 1.0",
            'penstock_worker_free_kv_blocks{role="decode",worker="decode-0"} 60.0',
            'penstock_worker_preemptions_total{role="decode",worker="decode-0"} 7.0',
            'penstock_worker_state{role="decode",state="ready",worker="decode-0"} 1.0',
            'penstock_worker_breaker_open{leg="prefill",role="decode",worker="decode-0"} 1.0',
            'penstock_worker_breaker_open{leg="decode",role="decode",worker="decode-0"} 0.0',
            'penstock_role_changes_total{by="planner",from="decode",to="both"} 2.0',
        ):
            assert line in text.splitlines(), line

    asyncio.run(run())


def test_tokenize_prompt_and_messages(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            status, body = await served.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
            assert status == 200
            assert body == {
                "count": 3,
                "max_model_len": 4096,
                "tokens": [104, 195, 169],
                "token_strs": ["h", "\ufffd", "\ufffd"],
            }
            messages = [{"role": "user", "content": "x"}]
            _, body = await served.post(
                "/tokenize", {"model": "toy", "messages": messages, "add_generation_prompt": False}
            )
            assert bytes(body["tokens"]) == b"user: x\n"
            assert (await served.post("/tokenize", {"prompt": ""}))[1]["count"] == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_tokenization_refuses_by_name(serve: Any, path: str, body: dict[str, Any], param: str) -> None:
    async def run() -> None:
        async with serve() as served:
            status, answer = await served.post(path, body)
            assert status in (400, 404)
            assert answer["error"]["param"] == param

    asyncio.run(run())


def test_detokenize_undoes_tokenize(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            text = "The “quick” fox 🦊 " * 1000  # long enough for the executor
            _, body = await served.post("/tokenize", {"prompt": text})
            assert (await served.post("/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": text}

    asyncio.run(run())


def test_prompt_over_the_character_bound_is_refused_untokenized(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serve(limits={"max_prompt_chars": 100}) as served:
            monkeypatch.setattr(
                served.gateway.tokenizer, "encode", lambda *_, **__: pytest.fail("tokenized"), raising=False
            )
            long = [{"role": "user", "content": "x" * 60}] * 2
            for path, body in (
                ("/tokenize", {"prompt": "x" * 101}),
                ("/v1/completions", {"model": "toy", "prompt": ["x" * 51, "y" * 51]}),
                ("/v1/chat/completions", {"model": "toy", "messages": long}),
            ):
                status, answer = await served.post(path, body)
                assert status == 400
                assert "the bound is 100" in answer["error"]["message"]

    asyncio.run(run())


def test_cors_is_off_by_default(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            headers = {"Origin": "http://a.example"}
            async with served.http.get(served.url + "/version", headers=headers) as response:
                assert "Access-Control-Allow-Origin" not in response.headers

    asyncio.run(run())


def test_cors_lets_named_origins_in_only(serve: Any) -> None:
    async def run() -> None:
        config = {"cors_origins": ("http://a.example",), "api_keys": ("k",)}
        async with serve(config=config) as served:
            for origin, allowed in (("http://a.example", True), ("http://b.example", False)):
                headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
                async with served.http.options(served.url + "/v1/completions", headers=headers) as response:
                    assert (response.status == 204) == allowed
                    assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
                auth = {"Authorization": "Bearer k", "Origin": origin}
                body = {"model": "toy", "prompt": "x", "stream": True}
                async with served.http.post(served.url + "/v1/completions", json=body, headers=auth) as response:
                    assert response.status == 200
                    assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)

    asyncio.run(run())


@pytest.mark.parametrize(
    "config",
    [
        GatewayConfig("m", 1),
        GatewayConfig("m", 10, limits=Limits(max_n=17)),
        GatewayConfig("m", 10, api_keys=("",)),
        GatewayConfig("m", 10, timeout_s=0),
    ],
)
def test_config_that_cannot_work_is_refused(config: GatewayConfig) -> None:
    with pytest.raises(ConfigError):
        create_app(config, None, None, MonotonicClock(), SeededIds(1))  # type: ignore[arg-type]


def test_role_of_a_worker_reaches_the_router_and_bad_ones_do_not(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            assert (await served.post("/workers/decode-0/role", {"role": "both"}))[0] == 200
            for worker, body in (
                ("nobody", {"role": "both"}),
                ("decode-0", {"role": "boss"}),
                ("decode-0", {}),
                ("decode-0", {"role": "both", "more": 1}),
            ):
                assert (await served.post(f"/workers/{worker}/role", body))[0] == 400
            assert served.router.roles == [("decode-0", "both")]

    asyncio.run(run())


def test_role_asks_for_a_key(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"api_keys": ("secret",)}) as served:
            assert (await served.post("/workers/decode-0/role", {"role": "both"}))[0] == 401
            assert served.router.roles == []

    asyncio.run(run())
