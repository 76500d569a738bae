"""Two gateways on the workers of one real cluster: streams on both, and one of them is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.testing.serving import Serving, free_port, serving, stop
from penstock.worker.routers import ROUTER_GONE_S

MODEL = "smollm2-135m-instruct"
LONG = 500  # tokens: more than are drawn while the tests look on
pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def first(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    file = tmp_path_factory.mktemp("exact") / "topology.yaml"
    file.write_text("router: {exact_index: true}\n", encoding="utf-8")
    with serving("--topology", str(file), "--prefill", "1", "--decode", "2", "--kv-cache-mib", "128") as running:
        yield running


@contextmanager
def gateway(first: Serving, folder: Path, port: int) -> Iterator[Serving]:
    """`penstock gateway` on the cluster of `first`."""
    runtime_dir = re.search(r"--topology (\S+)/topology\.yaml", command_line(first.workers()["decode-0"]["pid"]))
    assert runtime_dir is not None
    command = [sys.executable, "-P", "-m", "penstock", "gateway", "--join", runtime_dir[1], "--port", str(port)]
    log = folder / "gateway.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        running = Serving(f"http://127.0.0.1:{port}", process, log)
        try:
            running.wait_ready()
            yield running
        finally:
            stop(process)


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def body(number: int, max_tokens: int = 40) -> dict[str, Any]:
    prompt = list(range(1000 + 100 * number, 1000 + 100 * number + 90))
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def text_of(cluster: Serving, number: int, max_tokens: int = 40) -> str:
    pieces = []
    for event in cluster.stream("/v1/completions", body(number, max_tokens)):
        assert "error" not in event, event
        pieces += [choice["text"] for choice in event["choices"]]
    return "".join(pieces)


class Stream(threading.Thread):
    """Reads one answer to its end, or to the end of its connection."""

    def __init__(self, cluster: Serving, number: int, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._events = cluster.stream("/v1/completions", body(number, max_tokens))
        self.text, self.error = "", ""
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for event in self._events:
                self.text += "".join(choice["text"] for choice in event.get("choices", []))
                self.has_begun.set()
        except OSError as error:
            self.error = str(error) or type(error).__name__


def eventually(is_true: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def running_of(cluster: Serving) -> int:
    return sum(int(row["running"]) + int(row["waiting"]) for row in cluster.workers().values())


def test_streams_of_one_gateway_go_on_when_the_other_is_killed(first: Serving, tmp_path: Path) -> None:
    expected = text_of(first, 0, LONG)
    first.wait_rest()
    port = free_port()
    with gateway(first, tmp_path, port) as second:
        assert text_of(second, 1) == text_of(first, 1)
        mine, lost = Stream(first, 0, LONG), Stream(second, 2, LONG)
        assert mine.has_begun.wait(60)
        assert lost.has_begun.wait(60)
        eventually(lambda: running_of(first) == running_of(second) == 2, 5)  # each sees what both cause
        os.kill(second.process.pid, signal.SIGKILL)
        second.process.wait()
        eventually(lambda: running_of(first) == 1 or not mine.is_alive(), ROUTER_GONE_S + 10)
        mine.join(120)
        lost.join(10)
    assert (mine.text, mine.error) == (expected, "")
    assert not lost.is_alive()
    rows = first.wait_rest()
    assert {row["restarts"] for row in rows.values()} == {0}
    with gateway(first, tmp_path, port) as again:
        assert text_of(again, 3) == text_of(first, 3)
        again.wait_rest()


def test_streams_of_a_later_gateway_go_on_when_the_first_is_killed(first: Serving, tmp_path: Path) -> None:
    expected = text_of(first, 4, LONG)
    with gateway(first, tmp_path, free_port()) as second:
        mine = Stream(second, 4, LONG)
        assert mine.has_begun.wait(60)
        [front] = [
            int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_front(int(pid), parent=first.process.pid)
        ]
        os.kill(front, signal.SIGKILL)
        mine.join(120)
        assert (mine.text, mine.error) == (expected, "")
        first.wait_ready()
        assert text_of(first, 1) == text_of(second, 1)


def test_later_gateway_knows_what_the_caches_hold(first: Serving, tmp_path: Path) -> None:
    held = Stream(first, 10, 150)
    assert held.has_begun.wait(60)
    elsewhere = decode_of(first, 11)
    held.join(120)
    first.wait_rest()
    with gateway(first, tmp_path, free_port()) as second:
        time.sleep(1.0)  # the workers' news come
        assert decode_of(second, 11) == elsewhere
        assert decode_of(second, 10) != elsewhere


def decode_of(cluster: Serving, number: int) -> str:
    """Where the prompt of this number is decoded."""
    return str(cluster.post("/v1/completions", body(number, 1))["penstock"]["decision"]["decode"])


def is_front(pid: int, parent: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1]) == parent and " router " in command_line(pid)
    except OSError:
        return False
