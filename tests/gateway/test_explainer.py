"""GET /explain and /explain/ID of a running gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from penstock.gateway.explain.parts import TTFT_PARTS
from penstock.gateway.explain.report import Explanation


async def _get(served: Any, path: str, **headers: str) -> tuple[int, Any]:
    async with served.http.get(served.url + path, headers=headers) as response:
        return response.status, await response.json()


def test_explain_tells_of_the_requests_there_were(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            assert (await _get(served, "/explain"))[1]["bottleneck"]["name"] == "idle"
            for _ in range(3):
                await served.completion(max_tokens=4)
            await served.events("/v1/chat/completions", max_tokens=4)
            status, document = await _get(served, "/explain?window_s=30")
        assert status == 200
        found = msgspec.convert(document, Explanation)
        assert (found.window_s, found.requests, found.ttft.count, found.itl.count) == (30.0, 4, 4, 12)
        assert [row.name for row in found.ttft.parts] == list(TTFT_PARTS)
        assert sum(row.ms.p90 for row in found.ttft.parts) == pytest.approx(found.ttft.ms.p90)
        assert [worker.worker_id for worker in found.workers] == ["decode-0"]
        assert found.workers[0].kv_used == pytest.approx(0.4)

    asyncio.run(run())


def test_one_request_is_found_by_answer_and_by_label(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            body = {"model": "toy", "prompt": ["a", "b"], "max_tokens": 3}
            async with served.http.post(
                served.url + "/v1/completions", json=body, headers={"X-Request-Id": "mine"}
            ) as response:
                answer = await response.json()
            by_label = (await _get(served, "/explain/mine"))[1]["requests"]
            by_id = (await _get(served, f"/explain/{answer['id']}"))[1]["requests"]
            status, missing = await _get(served, "/explain/nobody")
        assert [r["request_id"] for r in by_label] == [r["request_id"] for r in by_id]
        assert [r["request_id"] for r in by_id] == [f"{answer['id']}-0", f"{answer['id']}-1"]
        reports = answer["penstock"]["prompts"]
        for found, report in zip(by_id, reports, strict=True):
            assert found["ttft"] == report["ttft"]
            assert sum(found["ttft"].values()) == pytest.approx(report["first_piece_ms"])
            assert (found["prompt_tokens"], found["tokens"]) == (1, 3)
        assert status == 404
        assert "no recent request" in missing["error"]["message"]

    asyncio.run(run())


def test_stream_reports_the_time_to_its_first_piece(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            *_, last, _ = await served.events("/v1/completions", max_tokens=5, stream_options={"include_usage": True})
        report = last["penstock"]
        assert report["first_piece_ms"] >= report["ttft_ms"]
        assert sum(report["ttft"].values()) == pytest.approx(report["first_piece_ms"])
        assert report["ttft"]["write"] > 0

    asyncio.run(run())


@pytest.mark.parametrize("value", ["0", "301", "nan", "x", "-5", "inf", ""])
def test_window_out_of_bounds_is_refused_by_name(serve: Any, value: str) -> None:
    async def run() -> None:
        async with serve() as served:
            status, body = await _get(served, f"/explain?window_s={value}")
        assert status == 400
        assert body["error"]["param"] == "window_s"

    asyncio.run(run())


def test_explain_asks_for_a_key_as_status_does(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"api_keys": ("secret",)}) as served:
            for path in ("/explain", "/explain/x"):
                assert (await _get(served, path))[0] == 401
            assert (await _get(served, "/explain", Authorization="Bearer secret"))[0] == 200

    asyncio.run(run())


def test_a_request_is_shown_to_its_own_tenant_only(serve: Any) -> None:
    async def run() -> None:
        async with serve(config={"api_keys": ("one", "two")}) as served:
            headers = {"Authorization": "Bearer one", "X-Request-Id": "mine"}
            body = {"model": "toy", "prompt": "x", "max_tokens": 2}
            async with served.http.post(served.url + "/v1/completions", json=body, headers=headers) as response:
                assert response.status == 200
            statuses = {
                key: (await _get(served, "/explain/mine", Authorization=f"Bearer {key}"))[0] for key in ("one", "two")
            }
        assert statuses == {"one": 200, "two": 404}

    asyncio.run(run())


def test_metrics_add_the_parts_up(serve: Any) -> None:
    async def run() -> None:
        async with serve() as served:
            await served.completion(max_tokens=4)
            async with served.http.get(served.url + "/metrics") as response:
                text = await response.text()
        assert 'penstock_ttft_part_seconds_total{part="prefill_compute"}' in text
        assert 'penstock_itl_part_seconds_total{part="delivery"}' in text
        assert 'penstock_worker_busy_seconds_total{role="decode",worker="decode-0"} 0.0' in text

    asyncio.run(run())
