"""Sends a plan and collects records.

Open loop: 1. every conversation has its time before the run begins; 2. its first request is made ready ahead; 3. at
its time it is sent, whatever the server does; one that is late is sent too, and its latency counts from its time.
Closed loop: so many conversations are under way at once; the next begins when one ends.
In both, a conversation's next turn is intended `think_s` after the answer before it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..core.clock import Clock
from .client import Call, Client
from .plan import Conversation, Workload
from .record import Asked, Record
from .rendering import Renderer
from .sending import PATHS, Dialogue, RequestForm

HEARTBEAT_S = 0.005
LOOK_S = 0.25  # so often a wait for the next request looks whether the run is over
EARLY_S = 1e-7  # so much before its time is on time: sums of times round
MAX_AHEAD_TOKENS = 4_000_000  # prompts up to this many tokens are all made before the run; about 30 MB of JSON

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Either `times`, one for each conversation, or `concurrency` with optionally a last moment to begin another."""

    times: Sequence[float] | None = None
    concurrency: int = 0
    until_s: float | None = None


@dataclass(slots=True)
class Recorded:
    """What a run leaves: its records, and how late the client's own loop was."""

    records: list[Record] = field(default_factory=list)
    loop_lags_s: list[float] = field(default_factory=list)
    cpu_share: float = 0.0
    num_planned: int = 0


class Runner:
    """One run against one server. `watch` hears of every record as it ends; when `is_decided` says so of what there is,
    the rest is given up.
    """

    def __init__(
        self,
        client: Client,
        form: RequestForm,
        renderer: Renderer,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
        watch: Callable[[Recorded, float], None] | None = None,
        is_decided: Callable[[Recorded], bool] | None = None,
    ) -> None:
        self._client, self._form, self._renderer = client, form, renderer
        self._clock, self._sleep, self._watch, self._is_decided = clock, sleep, watch, is_decided
        self._is_over = False
        self._recorded = Recorded()
        self._start_s = 0.0

    async def run(self, workload: Workload, schedule: Schedule) -> Recorded:
        """Until every request has ended."""
        self._recorded = recorded = Recorded(num_planned=workload.num_requests)
        ready = self._all_ready(workload)
        self._client.begin()
        self._start_s = self._clock.now()
        cpu_s = time.process_time()
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            if schedule.times is not None:
                await self._open(workload.conversations, schedule.times, ready)
            else:
                await self._closed(workload.conversations, schedule, ready)
        finally:
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)
        recorded.cpu_share = (time.process_time() - cpu_s) / max(1e-9, self._now())
        recorded.records.sort(key=lambda record: (record.asked.number, record.asked.turn))
        return recorded

    async def _open(
        self, conversations: Sequence[Conversation], times: Sequence[float], ready: list[tuple[Dialogue, bytes]]
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number, (conversation, at_s) in enumerate(zip(conversations, times, strict=True)):
                dialogue, body = ready[number] if ready else self._first(conversation)
                await self._wait_until(at_s)
                if self._is_over:
                    return
                tasks.create_task(self._converse(number, conversation, dialogue, body, at_s))

    async def _closed(
        self, conversations: Sequence[Conversation], schedule: Schedule, ready: list[tuple[Dialogue, bytes]]
    ) -> None:
        waiting = iter(enumerate(conversations))

        async def one_after_the_other() -> None:
            for number, conversation in waiting:
                if self._is_over or (schedule.until_s is not None and self._now() >= schedule.until_s):
                    return
                dialogue, body = ready[number] if ready else self._first(conversation)
                await self._converse(number, conversation, dialogue, body, self._now())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(schedule.concurrency, len(conversations))):
                tasks.create_task(one_after_the_other())

    async def _converse(
        self, number: int, conversation: Conversation, dialogue: Dialogue, body: bytes, at_s: float
    ) -> None:
        for place, turn in enumerate(conversation.turns):
            if place:
                body = dialogue.body(turn)
                await self._wait_until(at_s)
                if self._is_over:
                    return
            asked = Asked(number, at_s, turn.num_prompt_tokens, turn.num_output_tokens, place, conversation.category)
            record, text = await self._client.send(Call(asked, PATHS[self._form.endpoint], body), self._start_s)
            self._recorded.records.append(record)
            if self._watch is not None:
                self._watch(self._recorded, self._now())
            self._decide()
            if record.failure is not None or self._is_over:
                return  # there is nothing to go on behind
            dialogue.answered(text)
            at_s = record.end_s + conversation.think_s

    def _decide(self) -> None:
        if not self._is_over and self._is_decided is not None and self._is_decided(self._recorded):
            self.stop()

    def stop(self) -> None:
        """Send nothing more and give up what is under way; `run` returns what there is."""
        self._is_over = True
        self._client.give_up()

    def _all_ready(self, workload: Workload) -> list[tuple[Dialogue, bytes]]:
        total = sum(one.num_tokens for one in workload.conversations)
        return [self._first(one) for one in workload.conversations] if total <= MAX_AHEAD_TOKENS else []

    def _first(self, conversation: Conversation) -> tuple[Dialogue, bytes]:
        dialogue = Dialogue(conversation, self._form, self._renderer)
        return dialogue, dialogue.body(conversation.turns[0])

    async def _wait_until(self, at_s: float) -> None:
        while (wait_s := at_s - self._now()) > EARLY_S and not self._is_over:
            await self._sleep(min(wait_s, LOOK_S))

    async def _heartbeat(self) -> None:
        """How late this loop wakes: an answer that has come is read as late as that."""
        while True:
            due_s = self._clock.now() + HEARTBEAT_S
            await self._sleep(HEARTBEAT_S)
            self._recorded.loop_lags_s.append(max(0.0, self._clock.now() - due_s))

    def _now(self) -> float:
        return self._clock.now() - self._start_s
