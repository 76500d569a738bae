"""A real cluster on loopback, started by the same command a user types, for tests and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 120.0
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A running cluster: its URL, the supervisor's process, and what it wrote."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any], timeout: float = 300) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def stream(self, path: str, body: dict[str, Any], timeout: float = 300) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event up to [DONE]."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body | {"stream": True}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line[6:])

    def workers(self) -> dict[str, dict[str, Any]]:
        """The rows of `penstock status`, by worker id."""
        return {worker["worker_id"]: worker for worker in self.get("/status")["workers"]}

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until every worker has been there and a request could be served; raises TimeoutError with the log's end."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"penstock serve ended with {self.process.returncode}:\n{self.tail()}")
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"not ready after {timeout_s} s:\n{self.tail()}")

    def wait_rest(self, timeout_s: float = 30.0) -> dict[str, dict[str, Any]]:
        """Until no worker holds a block; the rows then. Raises TimeoutError that shows the rows."""
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self.workers()
            if rows and all(r["free_blocks"] == r["total_blocks"] and r["state"] == "ready" for r in rows.values()):
                return rows
            if time.monotonic() > deadline:
                raise TimeoutError(f"blocks are still held: {rows}")
            time.sleep(0.1)

    def tail(self, num_bytes: int = 6000) -> str:
        return self.log.read_bytes()[-num_bytes:].decode(errors="replace")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    *arguments: str, model: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Serving]:
    """`penstock serve [MODEL] ARGUMENTS` on a free port, with `environment` on top of our own; drained at the end,
    killed if that takes too long.
    """
    port = free_port()
    command = [
        sys.executable,
        "-P",
        "-m",
        "penstock",
        "serve",
        *([model] if model else []),
        "--port",
        str(port),
        *arguments,
    ]
    with tempfile.TemporaryDirectory(prefix="penstock-serving-") as folder:
        log = Path(folder) / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )
            running = Serving(f"http://127.0.0.1:{port}", process, log)
            try:
                running.wait_ready()
                yield running
            finally:
                stop(process)


@contextmanager
def side_by_side(topologies: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A cluster for each topology (YAML), by name; their URLs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-topologies-")))
        urls = {}
        for name, text in topologies.items():
            topology = folder / f"{name}.yaml"
            topology.write_text(text, encoding="utf-8")
            urls[name] = stack.enter_context(serving("--topology", str(topology))).url
        yield urls


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
