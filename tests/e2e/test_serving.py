"""`penstock serve` as a user runs it: real processes, the real model in float32, HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.decode_node.local import LocalRunner
from penstock.models.tokenizer import Tokenizer
from penstock.protocol.sampling import SamplingParams
from penstock.testing.serving import Serving, serving, stop
from penstock.tests.gateway.test_bad_bodies import broken_bodies

from .conftest import MakeEngine

MODEL = "smollm2-135m-instruct"
pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(model_path: Path) -> Iterator[Serving]:
    with serving("--dtype", "float32", "--kv-cache-mib", "256") as running:
        yield running


def completion(prompt: list[int] | str, max_tokens: int = 16, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


def text_of(events: Iterator[dict[str, Any]]) -> str:
    """The text of a stream; raises when it ends with an error."""
    pieces = []
    for event in events:
        assert "error" not in event, event
        pieces += [choice["text"] for choice in event["choices"]]
    return "".join(pieces)


def test_chat_is_answered_over_a_hand_off(cluster: Serving) -> None:
    question = [{"role": "user", "content": "Write a haiku about rain."}]
    answer = cluster.post(
        "/v1/chat/completions", {"model": MODEL, "messages": question, "max_tokens": 24, "temperature": 0}
    )
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] <= 24
    phases = answer["penstock"]
    assert phases["transferred_blocks"] > 0, "the prompt was prefilled apart and handed over"
    parts = sum(
        phases[name] for name in ("gateway_ms", "route_ms", "queue_ms", "prefill_ms", "transfer_ms", "other_ms")
    )
    assert parts == pytest.approx(phases["ttft_ms"], rel=0.01)


def test_completion_over_http_equals_the_engine_alone(
    cluster: Serving, make_engine: MakeEngine, tokenizer: Tokenizer, chats: list[list[int]]
) -> None:
    runner = LocalRunner(make_engine(64))
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    for prompt in chats[:4]:
        alone = [token.token_id for item in runner.stream(prompt, params) for token in item.tokens]
        found = cluster.post("/v1/completions", completion(prompt, 20))["choices"][0]["text"]
        assert found == tokenizer.decode(alone)


def test_official_client_streams_with_logprobs_and_reads_errors(cluster: Serving) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "List three fruits."}],
        max_tokens=12,
        temperature=0,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    entries = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content or []]
    assert entries
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert chunks[-1].usage is not None
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    client.close()


def test_n_choices_share_one_hand_off(cluster: Serving) -> None:
    body = completion("The old clock in the hall", 8, n=3, seed=5) | {"temperature": 1.0}
    first, again = (cluster.post("/v1/completions", body) for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert len(set(texts)) > 1
    assert texts == [choice["text"] for choice in again["choices"]], "the same seed gives the same answers"


def test_client_that_leaves_frees_its_blocks_on_both_nodes(cluster: Serving, chats: list[list[int]]) -> None:
    address = urllib.parse.urlsplit(cluster.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    body = json.dumps(completion(chats[5], 1500, stream=True))
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    deadline = time.monotonic() + 10
    while not _is_held(cluster.workers()["decode-0"]):  # a heartbeat tells
        assert time.monotonic() < deadline
    connection.sock.close() if connection.sock else None
    response.close()
    connection.close()
    rows = cluster.wait_rest(10)
    assert all(row["running"] == row["waiting"] == 0 for row in rows.values())


def _is_held(row: dict[str, Any]) -> bool:
    return bool(row["running"] + row["waiting"] > 0 or row["free_blocks"] < row["total_blocks"])


def test_bad_bodies_leave_a_live_stream_unchanged(cluster: Serving) -> None:
    expected = cluster.post("/v1/completions", completion("Once upon a time", 200))["choices"][0]["text"]
    with ThreadPoolExecutor(3) as pool:
        live = pool.submit(lambda: text_of(cluster.stream("/v1/completions", completion("Once upon a time", 200))))
        statuses = list(pool.map(lambda job: _post_raw(cluster, *job), broken_bodies(seed=3, count=2000)))
        assert live.result() == expected
    assert not [status for status in statuses if status >= 500]
    assert sum(status >= 400 for status in statuses) > 1000
    assert all(row["state"] == "ready" and row["restarts"] == 0 for row in cluster.workers().values())
    cluster.wait_rest()


def _post_raw(cluster: Serving, path: str, body: bytes) -> int:
    """The status; 0 when the body asks for so much that the client leaves before it is done."""
    body = body.replace(b'"toy"', b'"' + MODEL.encode() + b'"')
    request = urllib.request.Request(cluster.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=1) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except TimeoutError:
        return 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_killed_worker_under_load_loses_nothing_and_comes_back(
    cluster: Serving, victim: str, chats: list[list[int]]
) -> None:
    bodies = [completion(chats[i % len(chats)], 40 + i) for i in range(8)]
    expected = [cluster.post("/v1/completions", body)["choices"][0]["text"] for body in bodies]
    cluster.post("/reset_prefix_cache", {})
    before = cluster.workers()[victim]
    started = threading.Barrier(len(bodies) + 1)

    def run(body: dict[str, Any]) -> str:
        started.wait(30)
        return text_of(cluster.stream("/v1/completions", body))

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(run, body) for body in bodies]
        started.wait(30)
        time.sleep(0.7)
        os.kill(before["pid"], signal.SIGKILL)
        found = [answer.result(120) for answer in answers]
    assert found == expected
    cluster.wait_ready()
    _wait_for(lambda: cluster.workers().get(victim, before)["epoch"] != before["epoch"])
    rows = cluster.wait_rest(60)
    assert rows[victim]["restarts"] >= 1
    assert cluster.post("/v1/completions", completion(chats[0], 4))["choices"][0]["text"]


def _wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize("options", [("--transport", "tcp"), ("--one-pool",), ("--colocated",)], ids=lambda o: o[-1])
def test_other_shapes_answer_the_same_and_leave_nothing_behind(
    cluster: Serving, options: tuple[str, ...], chats: list[list[int]]
) -> None:
    body = completion(chats[1], 24)
    expected = cluster.post("/v1/completions", body)["choices"][0]["text"]
    before = _folders()
    with serving("--dtype", "float32", "--kv-cache-mib", "256", *options) as other:
        assert other.post("/v1/completions", body)["choices"][0]["text"] == expected
        links = {t for row in other.workers().values() for t in row["transports"].values()}
        assert links == {"--colocated": set(), "tcp": {"tcp"}, "--one-pool": {"owner"}}[options[-1]]
        pids = [row["pid"] for row in other.workers().values()]
        folders = _folders() - before
        stop(other.process)
        assert other.process.returncode == 0
    assert not [pid for pid in pids if _is_alive(pid)]
    assert not [path for path in folders if path.exists() and (path / "topology.yaml").exists()]


def _folders() -> set[Path]:
    """Of all clusters that run on this machine now."""
    return set(Path("/tmp").glob("penstock-*")) | set(Path("/dev/shm").glob("*penstock*"))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
