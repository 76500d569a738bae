"""A load test against a scripted server, both in one loop on virtual time: every moment is exact."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.loadtest.bench import Bench, Choice, Outcome, Task, perform
from penstock.loadtest.client import Client
from penstock.loadtest.record import Arrival, Asked, ErrorKind, Failure, Record, Use
from penstock.loadtest.runner import Recorded
from penstock.testing.mock_server import Body, MockServer, Script
from penstock.testing.virtual_loop import VirtualLoop, run_virtual


@dataclass(frozen=True)
class Tested:
    """What the load test says, and what the servers know."""

    outcome: Outcome
    servers: list[MockServer]

    @property
    def server(self) -> MockServer:
        return self.servers[0]


@pytest.fixture
def load_test(tmp_path: Path) -> Callable[..., Tested]:
    """`load_test(script, choice)`: a script for each server; the rest goes to MockServer."""

    def run(
        scripts: Callable[[int, Body], Script] | list[Callable[[int, Body], Script]],
        choice: Choice,
        task: Task | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        timeout_s: float = 600.0,
        interrupt_after: int | None = None,
        **settings: Any,
    ) -> Tested:
        scripts = scripts if isinstance(scripts, list) else [scripts]
        urls = tuple(f"http://server-{n}" for n in range(len(scripts)))

        async def main() -> Tested:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            servers = [MockServer(script, loop, **settings) for script in scripts]

            def client(url: str) -> Client:
                path = str(tmp_path / url.removeprefix("http://"))
                return Client(url, loop, timeout_s=timeout_s, unix_path=path)

            async with AsyncExitStack() as stack:
                for number, server in enumerate(servers):
                    await stack.enter_async_context(server.at(str(tmp_path / f"server-{number}")))

                def interrupt(_: str, recorded: Recorded, __: float) -> None:
                    if len(recorded.records) == interrupt_after:
                        bench.interrupt()

                bench = Bench(loop, sleep, interrupt)
                outcome = await perform(task or Task(urls), choice, bench, client)
            return Tested(outcome, servers)

        return run_virtual(main())

    return run


def make_record(
    intended_s: float = 0.0,
    times_s: tuple[float, ...] = (1.0, 2.0),
    tokens: tuple[int | None, ...] | None = None,
    sent_s: float | None = None,
    end_s: float | None = None,
    failure: ErrorKind | None = None,
    use: Use | None = None,
    number: int = 0,
) -> Record:
    """A record written by hand: events at `times_s` with `tokens` each (one, unless said)."""
    counts = tokens if tokens is not None else (1,) * len(times_s)
    total = sum(count or 0 for count in counts)
    record = Record(
        Asked(number, intended_s, 10, 16),
        sent_s=intended_s if sent_s is None else sent_s,
        arrivals=[Arrival(at, count) for at, count in zip(times_s, counts, strict=True)],
        first_s=times_s[0] if times_s else None,
        last_s=times_s[-1] if times_s else None,
        end_s=(times_s[-1] if times_s else intended_s) if end_s is None else end_s,
        use=use or Use(10, total),
    )
    if failure is not None:
        record.failure = Failure(failure, "because")
    return record


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record
