"""Runs of the fault matrix with real processes: one cluster, one run after the other, at rest between them.

The worker that is at the moment tells so and waits a little, and the driver strikes while it waits; a run whose strike
came too late, or whose moment did not come, is repeated up to three times.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from ..router.interface import GenerateRequest
from .fault import Aim
from .fault_cell import Run, RunFailed, RunResult, make_request
from .fault_kinds import Kind
from .fault_moments import Moment
from .real_cluster import Answered, RealCluster
from .real_fault import RealFault
from .real_faults import REAL_FAULTS
from .stub_worker import HOLD_S

NUM_PAIRS = 2
TRIES = 3
START_S, MOMENT_S, END_S, REST_S = 20.0, 5.0, 25.0, 25.0
TIMEOUT_S = 20.0  # of every request
PROMPT_TOKENS, OUTPUT_TOKENS = 40, 12
MAX_PROVOKED = 30


class Missed(Exception):
    """The moment did not come, or was over when the fault struck."""


def plan_real(kinds: Sequence[Kind], moments: Sequence[Moment]) -> list[Run]:
    """The runs that real processes allow, kind by kind."""
    return [
        Run(kind, moment, target, NUM_PAIRS)
        for kind in kinds
        for moment in moments
        for target in REAL_FAULTS[kind.name][1]
    ]


async def run_real(runs: Sequence[Run], on_result: Callable[[RunResult], None]) -> None:
    """Play every run; after a failure in a new cluster. Raises RunFailed for one that does not start."""
    waiting = list(runs)
    while waiting:
        async with RealCluster(NUM_PAIRS, random.Random(0)) as cluster:
            if not await cluster.until(cluster.is_at_rest, START_S):
                raise RunFailed(f"the cluster does not start: {cluster.describe()}")
            while waiting:
                run = waiting.pop(0)
                result = await _run_repeatedly(cluster, run)
                on_result(result)
                if result.outcome == "failed":
                    break


async def run_side_by_side(lanes: Sequence[Sequence[Run]], on_result: Callable[[RunResult], None]) -> None:
    """The same in several clusters at once."""
    async with asyncio.TaskGroup() as group:
        for runs in lanes:
            group.create_task(run_real(runs, on_result))


async def _run_repeatedly(cluster: RealCluster, run: Run) -> RunResult:
    for number in range(TRIES):
        play = _Play(cluster, run, number)
        try:
            return await play.play()
        except Missed as missed:
            why = str(missed)
            await cluster.until(cluster.is_at_rest, REST_S)
        except RunFailed as error:
            return RunResult(run, "failed", f"{error} [{cluster.describe()}]")
        finally:
            play.close()
    return RunResult(run, "failed", f"missed {TRIES} times: {why}")


_numbers = itertools.count()


class _Play:
    """One try at one run."""

    def __init__(self, cluster: RealCluster, run: Run, number: int) -> None:
        self._cluster, self._run = cluster, run
        self._rng = random.Random(zlib.crc32(f"{run.name} {number}".encode()))
        self._victim_id = f"victim/{run.moment.name}/{next(_numbers)}"
        self._asked: dict[str, asyncio.Task[Answered]] = {}
        self._has_come = asyncio.Event()
        self._fault: RealFault | None = None
        self._struck_at, self._late_s = 0.0, 0.0
        cluster.on_told = self._on_told

    def close(self) -> None:
        self._cluster.on_told = lambda name, facts: None
        if self._fault is not None:
            self._fault.close()
        for task in self._asked.values():
            task.cancel()

    # ---- the story ----

    async def play(self) -> RunResult:
        await self._submit_all()
        try:
            await asyncio.wait_for(self._has_come.wait(), MOMENT_S)
        except TimeoutError:
            await self._end_all()
            raise Missed(f"the moment {self._run.moment.value!r} never came") from None
        fault = self._fault
        assert fault is not None
        await self._end_all()
        await self._provoke(fault)
        await asyncio.sleep(max(0.0, self._struck_at + fault.lasts_s - time.monotonic()))
        if not await self._cluster.until(self._cluster.is_at_rest, REST_S):
            raise RunFailed("the cluster does not come to rest")
        await self._serve_more()
        if self._late_s > HOLD_S:
            raise Missed(f"the fault struck {self._late_s:.3f} s after the moment, which lasts {HOLD_S:g} s")
        if why := fault.verify():
            raise RunFailed(f"the fault did not happen: {why}")
        return self._result()

    async def _submit_all(self) -> None:
        for pause_s, request in _others(self._run, self._rng):
            self._ask(request)
            await asyncio.sleep(pause_s)
        if self._run.moment is Moment.BEFORE_ACCEPT:
            self._strike(self._any_pair(), time.monotonic())
        self._ask(self._request(self._victim_id, PROMPT_TOKENS, OUTPUT_TOKENS))
        await asyncio.sleep(0)  # lets the client submit
        status = self._cluster.router.status()
        if self._run.moment is Moment.QUEUED and status.queued_requests:
            self._strike(self._any_pair(), time.monotonic())

    def _any_pair(self) -> tuple[str, str]:
        number = self._rng.randrange(NUM_PAIRS)
        return f"prefill-{number}", f"decode-{number}"

    def _on_told(self, name: str, facts: dict[str, Any]) -> None:
        if facts.get("request") == self._victim_id and self._fault is None:
            pair: tuple[str, str] = (name, facts["peer"]) if name.startswith("prefill") else (facts["peer"], name)
            self._strike(pair, facts["at"])

    def _strike(self, pair: tuple[str, str], moment_at: float) -> None:
        make, _ = REAL_FAULTS[self._run.kind.name]
        self._fault = make(self._cluster, Aim(self._run.target, *pair), self._rng)
        self._fault.strike()
        self._struck_at = time.monotonic()
        self._late_s = self._struck_at - moment_at
        self._has_come.set()

    async def _end_all(self) -> None:
        """Every request ends; what its client saw is judged at once."""
        tasks = list(self._asked.values())
        _, pending = await asyncio.wait(tasks, timeout=END_S)
        if pending:
            raise RunFailed(f"{len(pending)} requests hang past their deadline of {TIMEOUT_S:g} s")
        for task in tasks:
            _judge(task.result())

    async def _provoke(self, fault: RealFault) -> None:
        for number in range(MAX_PROVOKED):
            if not fault.is_pending:
                break
            self._ask(self._request(f"provoke-{next(_numbers)}", 4 + number, 3))
            await asyncio.sleep(0.1)
        await self._end_all()

    async def _serve_more(self) -> None:
        for _ in range(NUM_PAIRS):
            self._ask(self._request(f"after-{next(_numbers)}", 18, 3))
        await self._end_all()
        if not await self._cluster.until(self._cluster.is_at_rest, REST_S):
            raise RunFailed("the cluster does not come to rest after one more request")

    # ---- requests ----

    def _request(self, request_id: str, num_prompt: int, num_output: int) -> GenerateRequest:
        return _limited(make_request(request_id, self._rng, num_prompt, num_output))

    def _ask(self, request: GenerateRequest) -> None:
        self._asked[request.request_id] = asyncio.create_task(self._cluster.ask(request))

    def _result(self) -> RunResult:
        seen = self._asked[self._victim_id].result()
        assert seen.end is not None
        outcome = "ok" if seen.end.attempts == 1 else "resumed"
        return RunResult(self._run, outcome, "", seen.end.attempts, max(0.0, seen.ended_at - self._struck_at))


def _judge(seen: Answered) -> None:
    """Raise RunFailed for anything but the exact answer: in this matrix no request is declared non-resumable."""
    name = seen.request.request_id
    if seen.refused is not None:
        raise RunFailed(f"request {name} was refused: {seen.refused}")
    if seen.wrong:
        raise RunFailed(f"request {name}: {seen.wrong}")
    if seen.end is None or seen.end.error is not None:
        raise RunFailed(f"request {name} ended with {seen.end}")
    if not seen.is_exact:
        raise RunFailed(f"request {name} got other tokens than without the fault: {seen.tokens}")


def _others(run: Run, rng: random.Random) -> Iterator[tuple[float, GenerateRequest]]:
    """(pause behind it, what) of the requests beside the victim."""
    if run.moment.crowd == "router":
        sizes = [(0.0, 52, 16, 1)] * (2 * NUM_PAIRS)
    elif run.moment.crowd == "decode":
        sizes = [(0.0, 8, 40, 1)] * (4 * NUM_PAIRS - 1) + [(0.25, 8, 40, 1)]
    else:
        sizes = [(0.0, 14, 8, 1), (0.01, 6, 6, 2)]
    for pause_s, num_prompt, num_output, n in sizes:
        yield pause_s, _limited(make_request(f"other-{next(_numbers)}", rng, num_prompt, num_output, n))


def _limited(request: GenerateRequest) -> GenerateRequest:
    return msgspec.structs.replace(request, timeout_s=TIMEOUT_S)
