"""`penstock explain` and `top` on a real cluster: what the client measures is what the parts add up to."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from penstock.testing.serving import Serving, serving

MODEL = "smollm2-135m-instruct"
NUM_REQUESTS = 20
pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(model_path: Path) -> Iterator[Serving]:
    with serving("--kv-cache-mib", "128") as running:
        yield running


class Client:
    """One kept connection, so that connecting is no part of what it measures."""

    def __init__(self, url: str) -> None:
        address = urllib.parse.urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        self._connection.connect()

    def stream(self, prompt: list[int], max_tokens: int) -> tuple[float, dict[str, Any]]:
        """(seconds from the first byte sent to the first event, what the last event says of the phases)."""
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        began = time.monotonic()
        self._connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        while not (line := response.readline()).startswith(b"data: "):
            assert line.strip() in (b"", b": ping"), line
        ttft_s = time.monotonic() - began
        events = [line, *response.read().split(b"\n")]
        last = [event for event in events if event.startswith(b"data: {")][-1]
        found: dict[str, Any] = json.loads(last[6:])["penstock"]
        return ttft_s, found

    def close(self) -> None:
        self._connection.close()


def test_clients_ttft_is_the_sum_of_the_parts(cluster: Serving) -> None:
    client = Client(cluster.url)
    client.stream(list(range(100, 150)), 2)
    ttfts_ms, beyond_ms, others_ms = [], [], []
    for number in range(NUM_REQUESTS):
        ttft_s, report = client.stream(list(range(1000 + 300 * number, 1000 + 300 * number + 64)), 4)
        parts = report["ttft"]
        assert sum(parts.values()) == pytest.approx(report["first_piece_ms"])
        assert parts["first_step"] > 0
        ttfts_ms.append(ttft_s * 1e3)
        beyond_ms.append(ttft_s * 1e3 - report["first_piece_ms"])
        others_ms.append(parts["other"])
    client.close()
    assert min(beyond_ms) > -0.01, "the client cannot see it before it is written"
    assert median(beyond_ms) < 0.1 * median(ttfts_ms), beyond_ms
    assert max(others_ms) == 0.0, "this version's workers account for all of it"


def penstock(cluster: Serving, *arguments: str) -> str:
    command = [sys.executable, "-m", "penstock", *arguments, "--url", cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_explain_finds_the_prefill_queue_of_a_burst(cluster: Serving) -> None:
    def one(number: int) -> dict[str, Any]:
        client = Client(cluster.url)
        try:
            return client.stream(list(range(500 + 37 * number, 500 + 37 * number + 600)), 8)[1]
        finally:
            client.close()

    with ThreadPoolExecutor(24) as pool:
        reports = list(pool.map(one, range(24)))
    assert all(sum(report["itl"].values()) > 0 for report in reports)
    found = json.loads(penstock(cluster, "explain", "--json", "--window", "300"))
    assert found["requests"] >= 24
    assert found["bottleneck"]["name"] in ("prefill-queue", "prefill-compute", "prefill-sharing"), found["bottleneck"]
    assert found["stream_bottleneck"]["name"] != "idle"
    prefill = next(worker for worker in found["workers"] if worker["role"] == "prefill")
    assert 0 < prefill["utilisation"] <= 1
    assert prefill["prefill_tokens_per_s"] > 0
    assert found["pipe"]["bytes"] > 0
    text = penstock(cluster, "explain", "--window", "300")
    assert "Bottleneck: prefill" in text
    assert "What if" in text


def test_explain_shows_a_single_request(cluster: Serving) -> None:
    answer = cluster.post("/v1/completions", {"model": MODEL, "prompt": "Rain", "max_tokens": 5, "ignore_eos": True})
    text = penstock(cluster, "explain", "--request", answer["id"])
    assert f"{answer['id']}-0" in text
    assert "prefill-0 → decode-0" in text


def test_top_lists_all_workers(cluster: Serving) -> None:
    frame = json.loads(penstock(cluster, "top", "--once", "--json", "--interval", "0.3"))
    assert [(worker["worker_id"], worker["role"]) for worker in frame["workers"]] == [
        ("decode-0", "decode"),
        ("prefill-0", "prefill"),
    ]
    assert "║ hand-offs:" in penstock(cluster, "top", "--once", "--interval", "0.3")
