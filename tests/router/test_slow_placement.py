"""Decisions are those of the slow twin, one after the other, on clusters in random states."""

from __future__ import annotations

import random
from itertools import count

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey, WorkerKey
from penstock.protocol.messages import Fingerprint, Heartbeat, Hello, Role, WorkerLoad, WorkerState
from penstock.protocol.sampling import SamplingParams
from penstock.router.auto import Auto, Targets
from penstock.router.breaker import Leg
from penstock.router.config import RouterConfig
from penstock.router.interface import GenerateRequest
from penstock.router.placement import Placement, Placer
from penstock.router.registry import Registry, WorkerRecord
from penstock.router.requests import RequestRecord, check_request

from .slow_placement import SlowAuto, SlowPlacer

SIZE = 16
TARGETS = Targets(10.0, 0.1)


class Worlds:
    """One registry, read by a quick placer and by a slow one; each has its own index, model and chooser."""

    def __init__(self, seed: int, disaggregate: str) -> None:
        self.rng = random.Random(seed)
        self.registry = Registry()
        config = RouterConfig(policy="auto", disaggregate=disaggregate, breaker_failures=1)  # type: ignore[arg-type]
        self.quick, self.slow = Placer(config, self.registry, "s"), SlowPlacer(config, self.registry, "s")
        self.quick._chooser = self.auto = Auto(self.quick.model, TARGETS)
        self.slow._chooser = self.slow_auto = SlowAuto(self.slow.model, TARGETS)
        self.now, self.numbers = 0.0, count()
        self.heads = [[self.rng.randrange(1000) for _ in range(3000)] for _ in range(4)]
        for number in range(self.rng.randrange(1, 14)):
            self.join(number)

    @property
    def workers(self) -> list[WorkerRecord]:
        return self.registry.all()

    def join(self, number: int) -> None:
        rng = self.rng
        size = SIZE * rng.choice([1, 1, 1, 2])
        fingerprint = Fingerprint("m", "w", "float32", 1, 1, 1, size, "l")
        role: Role = rng.choice(["prefill", "decode", "both"])
        longest = rng.choice([2000, 20_000])
        hello = Hello(role, 1, fingerprint, rng.choice([300, 4000]), longest, 64, "", [], rng.choice([2, 64]))
        self.registry.greet(WorkerKey(f"w{number}", f"{rng.randrange(3):016x}"), hello, 0.0)

    def stir(self) -> None:
        """Something changes for some worker."""
        rng, self.now = self.rng, self.now + self.rng.random()
        worker = rng.choice(self.workers)
        sources = [other for other in self.workers if other.can_prefill and other is not worker and rng.random() < 0.8]
        state: WorkerState = "ready" if rng.random() < 0.8 else "draining"
        linked = [(*other.key, rng.choice(["shm", "tcp", "tcp"])) for other in sources]
        worker.note_heartbeat(Heartbeat(1, state, WorkerLoad(), [], linked), self.now)
        worker.num_streams = rng.choice([0, 0, rng.randrange(30)])
        worker.num_running = rng.randrange(worker.num_streams + 1)
        worker.used_blocks = worker.num_streams * rng.randrange(20)
        worker.attempts = {AttemptKey(str(i), 1): None for i in range(rng.choice([0, 1, 2, 70]))}
        for _ in range(rng.randrange(3)):
            worker.prompts.add(AttemptKey(f"p{next(self.numbers)}", 1), rng.uniform(0.01, 3.0), self.now)
        if rng.random() < 0.3:
            for key in list(worker.prompts._seconds):
                worker.prompts.remove(key, self.now)
        self._learn(worker)
        if rng.random() < 0.1:
            leg: Leg = "prefill" if rng.random() < 0.5 else "decode"
            for placer in (self.quick, self.slow):
                placer.breakers.note_failure(worker.key, leg, InternalError("broken"), self.now)
        if rng.random() < 0.1:
            self.join(rng.randrange(16))

    def _learn(self, worker: WorkerRecord) -> None:
        rng = self.rng
        new, streams, seconds, paces = rng.randrange(1, 3000), rng.randrange(9), rng.random(), rng.random() / 20
        other, length = rng.choice(self.workers), rng.randrange(1, 900)
        for placer in (self.quick, self.slow):
            placer.model.saw_prefill(worker.key, new, 100, streams, seconds, streams % 3)
            placer.model.saw_transfer(worker.key, other.key, 64 * new, seconds / 10)
            placer.model.saw_tokens(streams, 500.0 * streams, seconds / 50, paces, seconds / 90)
            placer.model.saw_answer(length)

    def ask(self) -> GenerateRequest:
        rng = self.rng
        ids = rng.choice(self.heads)[: rng.randrange(2000)] + [
            rng.randrange(1000) for _ in range(rng.randrange(1, 900))
        ]
        return GenerateRequest(f"r{next(self.numbers)}", ids, SamplingParams(max_tokens=rng.choice([1, 64, 900])), 60.0)

    def records(self) -> tuple[RequestRecord, RequestRecord]:
        request, rng = self.ask(), self.rng
        data, avoided, fruitless = check_request(request), rng.choice(self.workers).key, rng.choice([0, 0, 0, 1, 2])
        first, second = (RequestRecord(request, 1, data, self.now, self.now + 60.0) for _ in range(2))
        for record in (first, second):
            record.avoid = (avoided,) if fruitless else ()
            record.fruitless = fruitless
        return first, second


@pytest.mark.parametrize("disaggregate", ["auto", "always", "never"])
@pytest.mark.parametrize("seed", range(40))
def test_every_decision_is_the_slow_twins(seed: int, disaggregate: str) -> None:
    worlds, num_placed = Worlds(seed, disaggregate), 0
    for _ in range(60):
        worlds.stir()
        mine, twins = worlds.records()
        quick, slow = worlds.quick.place(mine, worlds.now), worlds.slow.place(twins, worlds.now)
        assert quick == slow
        if isinstance(quick, Placement) and isinstance(slow, Placement):
            num_placed += 1
            worlds.quick.note_dispatch(mine, quick)
            worlds.slow.note_dispatch(twins, slow)
    assert worlds.auto.pressure == worlds.slow_auto.pressure
    assert num_placed or disaggregate == "always"


def test_idle_workers_tie_and_the_first_by_name_is_taken() -> None:
    worlds = Worlds(1, "auto")
    for number in range(20, 24):
        worlds.join(number)
    for worker in worlds.workers:
        worker.note_heartbeat(Heartbeat(1, "ready", WorkerLoad(), [], []), 0.0)
    mine, twins = worlds.records()
    mine.avoid = twins.avoid = ()
    mine.fruitless = twins.fruitless = 0
    assert worlds.quick.place(mine, 0.0) == worlds.slow.place(twins, 0.0)
