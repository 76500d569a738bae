"""What each transport reaches on this machine, between two processes, with everything a real hand-off does.

One long prompt in one hand-off, many short ones at once, and the time of the smallest one, beside a plain copy of the
same bytes taken in the same run. The shapes are those of SmolLM2-135M unless told otherwise.
"""

from __future__ import annotations

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from ..engine.shared_files import SharedFiles
from .bench_peer import BenchSettings
from .ownership import TRANSPORT as OWNER

SHORT_PROMPTS, SHORT_TOKENS, SINGLE_BLOCKS = 64, 128, 30


class TransferFigures(msgspec.Struct, frozen=True):
    """Medians of one transport. `digest_cost`: how much longer the long hand-off takes with digests than without."""

    transport: str
    gbps: float  # one long prompt, offer to verified
    memcpy_gbps: float
    latency_us: float  # one block, offer to verified
    cpu_s_per_gb: float  # both processes
    digest: str
    share_of_memcpy: float
    many_gbps: float  # many short prompts at once
    digest_cost: float
    num_tokens: int
    rounds: int
    plain_socket_gbps: float = 0.0  # tcp only: the same bytes through a bare socket


Say = Callable[[str], None]


def measure_transport(transport: str, num_tokens: int, rounds: int, say: Say) -> TransferFigures:
    """All figures of one transport; raises RuntimeError when its ends cannot be linked."""
    block_size = BenchSettings("", "", b"", 1).block_size
    num_blocks = -(-num_tokens // block_size)
    with _pair(transport, num_blocks, digests=False) as plain:
        without = [plain.long(num_blocks) for _ in range(rounds + 1)][1:]
    with _pair(transport, num_blocks, digests=True) as pair:
        pair.long(num_blocks)
        copies: list[float] = []
        plainly: list[float] = []
        runs: list[_Run] = []
        for number in range(rounds):
            copies.append(pair.memcpy_gbps(num_blocks))
            plainly += [pair.plain_gbps(num_blocks)] if transport == "tcp" else []
            runs.append(pair.long(num_blocks))
            say(f"{transport}: round {number + 1} of {rounds}, {runs[-1].gbps:.2f} GB/s, memcpy {copies[-1]:.2f}")
        many = [pair.many(SHORT_PROMPTS, -(-SHORT_TOKENS // block_size)).gbps for _ in range(rounds)]
        single = [pair.many(1, 1).seconds * 1e6 for _ in range(SINGLE_BLOCKS)]
    gbps, copied = statistics.median(run.gbps for run in runs), statistics.median(copies)
    seconds = statistics.median(run.seconds for run in runs)
    return TransferFigures(
        transport=transport,
        gbps=round(gbps, 3),
        memcpy_gbps=round(copied, 3),
        latency_us=round(statistics.median(single), 1),
        cpu_s_per_gb=round(statistics.median(run.cpu_s / run.gigabytes for run in runs), 3),
        digest="xxh3-64",
        share_of_memcpy=round(gbps / copied, 3),
        many_gbps=round(statistics.median(many), 3),
        digest_cost=round(seconds / statistics.median(run.seconds for run in without) - 1, 3),
        num_tokens=num_tokens,
        rounds=rounds,
        plain_socket_gbps=round(statistics.median(plainly), 3) if plainly else 0.0,
    )


class _Run(msgspec.Struct, frozen=True):
    seconds: float
    gigabytes: float
    cpu_s: float

    @property
    def gbps(self) -> float:
        return self.gigabytes / self.seconds


class _Pair:
    """Two linked peers."""

    def __init__(self, source: subprocess.Popen[str], destination: subprocess.Popen[str], block_bytes: int) -> None:
        self._source, self._destination, self._block_bytes = source, destination, block_bytes

    def long(self, num_blocks: int) -> _Run:
        return self.many(1, num_blocks)

    def many(self, count: int, num_blocks: int) -> _Run:
        """`count` hand-offs of `num_blocks` blocks, offered at once: from the first offer to the last one verified."""
        jobs = [[secrets.token_hex(16), num_blocks] for _ in range(count)]
        _ask(self._destination, "expect", jobs)
        _tell(self._destination, "receive", jobs)
        opened = _ask(self._source, "open", jobs)
        received = _hear(self._destination)
        failed = [code for code in (*opened["codes"], *received["codes"]) if code]
        if failed:
            raise RuntimeError(f"a measured hand-off failed: {failed[0]}")
        seconds = max(received["received"]) - min(opened["opened"])
        nbytes = count * num_blocks * self._block_bytes
        return _Run(seconds, nbytes / 1e9, opened["cpu_s"] + received["cpu_s"])

    def plain_gbps(self, num_blocks: int) -> float:
        """The same bytes through a bare TCP socket."""
        port = _ask(self._destination, "listen", None)["port"]
        _tell(self._destination, "receive_plainly", num_blocks)
        started = _ask(self._source, "send_plainly", [port, num_blocks])["moment"]
        seconds: float = _hear(self._destination)["moment"] - started
        return num_blocks * self._block_bytes / seconds / 1e9

    def memcpy_gbps(self, num_blocks: int) -> float:
        seconds: float = _ask(self._destination, "memcpy", num_blocks)["seconds"]
        return num_blocks * self._block_bytes / seconds / 1e9


@contextmanager
def _pair(transport: str, num_blocks: int, digests: bool) -> Iterator[_Pair]:
    with _shared_files(transport) as shared, tempfile.TemporaryDirectory(prefix="kvb-") as folder:
        settings = BenchSettings(transport, folder, secrets.token_bytes(32), num_blocks, digests=digests)
        many = SHORT_PROMPTS * -(-SHORT_TOKENS // settings.block_size)
        settings = msgspec.structs.replace(settings, num_blocks=max(num_blocks, many))
        with _peer("source", settings, shared) as source, _peer("destination", settings, shared) as destination:
            hello, answer = _hear(source), _hear(destination)
            _tell(source, "connect", answer)
            _ask(destination, "connect", hello)
            _hear(source)
            yield _Pair(source, destination, settings.num_layers * settings.layer_bytes)
            for peer in (destination, source):
                _tell(peer, "close", None)


@contextmanager
def _shared_files(transport: str) -> Iterator[SharedFiles | None]:
    """The memory of both ends, where they keep their blocks in one."""
    if transport != OWNER:
        yield None
        return
    files = SharedFiles()
    try:
        yield files
    finally:
        files.close()


@contextmanager
def _peer(role: str, settings: BenchSettings, shared: SharedFiles | None = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "penstock.kvtransfer.bench_peer", role]
    text = msgspec.json.encode(settings).decode()
    fds: tuple[int, ...] = shared.fds if shared is not None else ()
    added = shared.environment() if shared is not None else {}
    process = subprocess.Popen(
        [*command, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        env=os.environ | added,
    )
    try:
        yield process
        process.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _tell(process: subprocess.Popen[str], name: str, argument: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps([name, argument]) + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("an end of the measured link has died; its error is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _ask(process: subprocess.Popen[str], name: str, argument: Any) -> dict[str, Any]:
    _tell(process, name, argument)
    return _hear(process)
