"""Roles and restarts of a real cluster under load: no stream has an error, and each says what it says undisturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.testing.serving import Serving, serving

MODEL = "smollm2-135m-instruct"
NUM_CLIENTS = 4
pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(model_path: Path) -> Iterator[Serving]:
    with serving("--prefill", "2", "--decode", "2", "--kv-cache-mib", "128") as running:
        yield running


def body(number: int) -> dict[str, Any]:
    prompt = list(range(1000 + 100 * number, 1000 + 100 * number + 90 + 10 * number))
    return {"model": MODEL, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def text_of(cluster: Serving, number: int) -> str:
    pieces = []
    for event in cluster.stream("/v1/completions", body(number)):
        assert "error" not in event, event
        pieces += [choice["text"] for choice in event["choices"]]
    return "".join(pieces)


@contextmanager
def load(cluster: Serving, expected: dict[int, str]) -> Iterator[list[int]]:
    """Clients that ask again and again; the list grows with each right answer. What went wrong is raised at the end."""
    stop, answered = threading.Event(), list[int]()

    def client(number: int) -> None:
        while not stop.is_set():
            assert text_of(cluster, number) == expected[number]
            answered.append(number)

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(NUM_CLIENTS)]
        try:
            yield answered
        finally:
            stop.set()
    for each in clients:
        each.result()


@pytest.fixture(scope="module")
def expected(cluster: Serving) -> dict[int, str]:
    return {number: text_of(cluster, number) for number in range(NUM_CLIENTS)}


def penstock(cluster: Serving, *arguments: str) -> str:
    command = [sys.executable, "-m", "penstock", *arguments, "--url", cluster.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr + cluster.tail()
    return done.stdout


def test_roles_change_under_load_without_an_error(cluster: Serving, expected: dict[int, str]) -> None:
    with load(cluster, expected) as answered:
        for name, role in (
            ("decode-1", "prefill"),
            ("prefill-0", "decode"),
            ("decode-1", "both"),
            ("prefill-0", "prefill"),
            ("decode-1", "decode"),
        ):
            before = len(answered)
            assert f"{name} is for {role}" in penstock(cluster, "role", name, role)
            while len(answered) < before + NUM_CLIENTS:
                assert cluster.process.poll() is None
                threading.Event().wait(0.05)
    rows = cluster.wait_rest()
    assert {name: row["role"] for name, row in rows.items()} == {
        "prefill-0": "prefill",
        "prefill-1": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
    }
    assert all(row["restarts"] == 0 for row in rows.values())


def test_rolling_restart_of_all_workers_under_load_has_no_error(cluster: Serving, expected: dict[int, str]) -> None:
    before = {name: row["epoch"] for name, row in cluster.workers().items()}
    with load(cluster, expected) as answered:
        said = penstock(cluster, "restart")
        assert answered, "requests went on meanwhile"
    assert [line.split(":")[0] for line in said.splitlines()] == list(before)
    after = {name: row["epoch"] for name, row in cluster.wait_rest().items()}
    assert all(after[name] != epoch for name, epoch in before.items())
