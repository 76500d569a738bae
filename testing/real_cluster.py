"""A cluster of real processes for the fault matrix: the router's service in this process, stub workers beside it, and a
proxy on every connection.

    RouterService ←tcp─ proxy ←tcp─ stub worker ─tcp→ proxy ─tcp→ stub worker (prefill)

The keeper of each worker starts it again when it ends, as the supervisor does, and tells the router of its death, if it
is to be told.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ..core.errors import ProtocolError, ServeError
from ..core.ids import SecureIds
from ..kvtransfer.transports.address import KvAddress
from ..protocol.messages import Role
from ..router.config import RouterConfig
from ..router.interface import EndEvent, GenerateRequest, TokensEvent, WorkerStatus
from ..router.service import RouterService
from .chaos_proxy import Address, ChaosProxy
from .fake_engine import expected_tokens
from .stub_worker import StubConfig

RESTART_S = 0.15
WORKER_TIMEOUT_S = 1.0
LOOK_S = 0.02


@dataclass(slots=True)
class Kept:
    """One worker: its process now, what it has told, and how its processes ended."""

    name: str
    role: Role
    control: ChaosProxy
    process: asyncio.subprocess.Process | None = None
    exits: list[int] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    tells_router: bool = True  # of its end

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def command(self, line: str) -> None:
        """Say something to the process."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def last_told(self, key: str) -> Any:
        return next((facts[key] for facts in reversed(self.told) if key in facts), None)


@dataclass(slots=True)
class Answered:
    """What one client saw. `wrong` names what a client must never see."""

    request: GenerateRequest
    tokens: list[list[int]]
    end: EndEvent | None = None
    refused: ServeError | None = None
    wrong: str = ""
    ended_at: float = 0.0

    @property
    def is_exact(self) -> bool:
        params = self.request.params
        expected = [expected_tokens(self.request.prompt_ids, params, choice)[0] for choice in range(params.n)]
        return self.tokens == expected


class RealCluster:
    """`num_pairs` prefill and as many decode workers. Use as an async context manager.

    `on_told` hears every line that a worker writes: its name, and the facts.
    """

    def __init__(self, num_pairs: int, rng: random.Random) -> None:
        self._rng, self._num_pairs = rng, num_pairs
        self.folder = Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp"))
        self._secret = secrets.token_bytes(32)
        self.router: RouterService
        self._router_port = 0
        self.workers: dict[str, Kept] = {}
        self.transfer: dict[str, ChaosProxy] = {}  # prefill worker → what its links go through
        self.on_told: Callable[[str, dict[str, Any]], None] = lambda name, facts: None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closing = False

    async def __aenter__(self) -> RealCluster:
        config = RouterConfig(worker_timeout_s=WORKER_TIMEOUT_S, max_attempts=6, expected_workers=2 * self._num_pairs)
        self.router = RouterService(config, "tcp://127.0.0.1:*", ids=SecureIds(), cluster_key=self._secret)
        await self.router.start()
        self._router_port = int(self.router.address.rpartition(":")[2])
        roles: list[Role] = ["prefill", "decode"]
        for role in roles:
            for number in range(self._num_pairs):
                await self._add(f"{role}-{number}", role)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closing = True
        for kept in self.workers.values():
            if kept.process is not None and kept.process.returncode is None:
                kept.process.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for kept in self.workers.values():
            if kept.process is not None:
                await kept.process.wait()
        for proxy in (*self.transfer.values(), *(kept.control for kept in self.workers.values())):
            await proxy.close()
        await self.router.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- processes ----

    async def _add(self, name: str, role: Role) -> None:
        control = ChaosProxy(lambda: ("127.0.0.1", self._router_port), self._rng)
        await control.start()
        transfer = ChaosProxy(lambda: self._kv_address(name), self._rng)
        await transfer.start()
        self.transfer[name] = transfer
        self.workers[name] = kept = Kept(name, role, control)
        self._tasks.append(asyncio.create_task(self._keep(kept), name=f"keep {name}"))

    def _kv_address(self, name: str) -> Address:
        """Where the worker listens now; raises ValueError while it does not."""
        try:
            address = KvAddress.parse((self.folder / f"{name}.kv").read_text(encoding="ascii"))
        except (OSError, ProtocolError) as error:
            raise ValueError(f"{name} does not listen: {error}") from error
        assert address.tcp is not None
        return address.tcp

    def _config(self, kept: Kept) -> StubConfig:
        return StubConfig(
            name=kept.name,
            role=kept.role,
            router_address=f"tcp://127.0.0.1:{kept.control.port}",
            runtime_dir=str(self.folder),
            cluster_key=self._secret.hex(),
            kv_port=self.transfer[kept.name].port,
        )

    async def _keep(self, kept: Kept) -> None:
        """Start it, and again whenever it ends."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = (sys.executable, "-m", "penstock.testing.stub_worker")
        while not self._is_closing:
            with self.log(kept.name).open("ab") as log:
                kept.process = await asyncio.create_subprocess_exec(
                    *command,
                    msgspec.json.encode(self._config(kept)).decode(),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=environment,
                )
            await self._listen(kept, kept.process)
            kept.exits.append(await kept.process.wait())
            if kept.tells_router:
                self.router.worker_exited(kept.name, pid=kept.process.pid)
            kept.tells_router = True
            await asyncio.sleep(RESTART_S)

    async def _listen(self, kept: Kept, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            facts = json.loads(line)
            kept.told.append(facts)
            self.on_told(kept.name, facts)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    # ---- requests ----

    async def ask(self, request: GenerateRequest) -> Answered:
        """Submit and read to the end, as a client does."""
        seen = Answered(request, [[] for _ in range(request.params.n)])
        try:
            stream = self.router.submit(request)
        except ServeError as error:
            seen.refused, seen.ended_at = error, time.monotonic()
            return seen
        async for event in stream:
            if seen.end is not None:
                seen.wrong = f"{type(event).__name__} after the end"
            if isinstance(event, EndEvent):
                seen.end, seen.ended_at = event, time.monotonic()
            else:
                _take(seen, event)
        return seen

    # ---- looking ----

    def rows(self) -> dict[str, WorkerStatus]:
        return {row.worker_id: row for row in self.router.status().workers}

    def is_at_rest(self) -> bool:
        """Every process is there and linked, every block is free, no hand-off and no request is left."""
        rows, status = self.rows(), self.router.status()
        if len(rows) != len(self.workers) or status.active_requests or status.queued_requests:
            return False
        return all(
            row.state == "ready"
            and row.pid == self.workers[name].pid
            and row.free_blocks == row.total_blocks
            and row.load.receiving + row.load.handing_off + row.load.waiting + row.load.running == 0
            and len(row.transports) == self._num_pairs
            for name, row in rows.items()
        )

    def describe(self) -> str:
        """The rows, for the message of a failure."""
        return "; ".join(
            f"{name} {row.state} {row.free_blocks}/{row.total_blocks} free, {len(row.transports)} links"
            for name, row in self.rows().items()
        )

    async def until(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for something to become true; whether it did."""
        until = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(LOOK_S)
        return True


def _take(seen: Answered, event: TokensEvent) -> None:
    have = seen.tokens[event.choice]
    if event.index != len(have):
        seen.wrong = seen.wrong or f"index {event.index} after {len(have)} tokens"
    have += [token.token_id for token in event.tokens]
