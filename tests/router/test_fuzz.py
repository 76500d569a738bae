"""The core against workers that fail, over wires that lose, double and reorder. A failure names its seed."""

from __future__ import annotations

import random
from collections import deque

import pytest

from penstock.core.errors import ServeError
from penstock.core.ids import WorkerKey
from penstock.protocol import codec
from penstock.protocol.messages import (
    Abort,
    AttemptFailed,
    FromWorker,
    Goodbye,
    Heartbeat,
    Output,
    PrefillEnded,
    SampledToken,
    StartDecode,
    StartPrefill,
    Tokens,
    WorkerLoad,
    unpack_ids,
)

STEPS = 150
EXPECTED_CODES = {"bad_request", "deadline_exceeded", "transfer_failed", "node_lost", "protocol_error"}

Attempt = tuple[str, int]  # request and number


class FuzzWorker:
    """Holds attempts, makes progress when poked, and forgets, fails or dies at will."""

    def __init__(self, fuzz, worker, role):
        self.fuzz, self.key, self.role = fuzz, worker, role
        self.received = 0
        self.is_frozen = False
        self.decodes: dict[Attempt, dict[int, int]] = {}  # the next index of each choice
        self.starts: dict[Attempt, StartDecode] = {}
        self.prefills: dict[Attempt, StartPrefill] = {}
        self.aborted: set[Attempt] = set()
        self.inbox: deque[bytes] = deque()

    def read(self):
        while self.inbox and not self.is_frozen:
            frame = codec.from_router.decode(self.inbox.popleft())
            self.received = max(self.received, frame.number)
            body = frame.body
            if isinstance(body, Abort):
                self.abort(body)
            elif isinstance(body, StartDecode | StartPrefill) and (body.request_id, body.attempt) not in self.aborted:
                self.start(body)

    def abort(self, body):
        key = (body.request_id, body.attempt)
        if body.choice is not None:
            self.decodes.get(key, {}).pop(body.choice, None)
            if self.decodes.get(key) == {}:
                del self.decodes[key]
            return
        self.aborted.add(key)
        self.decodes.pop(key, None)
        self.prefills.pop(key, None)

    def start(self, body):
        key = (body.request_id, body.attempt)
        if isinstance(body, StartPrefill):
            self.prefills[key] = body
        elif key not in self.starts:
            self.starts[key] = body
            self.decodes[key] = {state.choice: len(unpack_ids(state.output_ids)) for state in body.choices}

    def work(self, rng, trouble):
        self.read()
        if self.is_frozen:
            return
        if self.prefills and rng.random() < 0.6:
            key, body = self.prefills.popitem()
            ok = rng.random() >= trouble
            self.fuzz.handed_over.add((body.ticket, ok))
            self.fuzz.to_router(self.key, PrefillEnded(*key, ok, "" if ok else "transfer_failed"))
        for key in list(self.decodes):
            if rng.random() < 0.7:
                self.decode(key, rng, trouble)
        if rng.random() < 0.5:
            self.beat()

    def decode(self, key: Attempt, rng, trouble):
        start = self.starts[key]
        if start.ticket is not None and (start.ticket, True) not in self.fuzz.handed_over:
            if (start.ticket, False) in self.fuzz.handed_over:
                self.fail(key, retriable=True)
            return
        if rng.random() < trouble / 3:
            if rng.random() < 0.5:
                del self.decodes[key]  # forgets it without a word
            else:
                self.fail(key, retriable=rng.random() < 0.9)
            return
        items = []
        for choice, index in list(self.decodes[key].items()):
            count = rng.randint(1, min(3, start.params.max_tokens - index)) if index < start.params.max_tokens else 0
            is_last = index + count == start.params.max_tokens
            tokens = tuple(SampledToken(self.fuzz.token_at(choice, index + i)) for i in range(count))
            items.append(Tokens(*key, choice, index, tokens, "length" if is_last else None))
            self.decodes[key][choice] = index + count
            if is_last:
                del self.decodes[key][choice]
        if not self.decodes[key]:
            del self.decodes[key]
        self.fuzz.to_router(self.key, Output(items))

    def fail(self, key: Attempt, retriable):
        del self.decodes[key]
        self.fuzz.to_router(
            self.key, AttemptFailed(*key, "transfer_failed" if retriable else "bad_request", "x", retriable)
        )

    def beat(self):
        links = [(w.key.worker_id, w.key.epoch, "shm") for w in self.fuzz.workers.values() if w.role == "prefill"]
        active = list(self.decodes) + list(self.prefills)
        load = WorkerLoad(60, 60)
        beat = Heartbeat(self.received, "ready", load, active, links if self.role != "prefill" else [])
        self.fuzz.to_router(self.key, beat)


class Fuzz:
    def __init__(self, rig, seed):
        self.rig, self.rng = rig, random.Random(seed)
        self.token_at = rig.token_at
        self.trouble = self.rng.choice([0.0, 0.1, 0.3])
        self.loss = self.rng.choice([0.0, 0.05, 0.2])
        self.had_trouble = self.trouble > 0 or self.loss > 0
        self.workers: dict[str, FuzzWorker] = {}
        self.generation = 0
        self.handed_over: set[tuple[bytes, bool]] = set()
        self.up: deque[bytes] = deque()
        roles = [("p", "prefill", self.rng.randint(0, 2)), ("d", "decode", self.rng.randint(1, 2)), ("b", "both", 1)]
        self.roles = {f"{name}{i}": role for name, role, count in roles for i in range(count)}
        for worker_id in self.roles:
            self.boot(worker_id)
        self.count = 0
        self.urgency = random.Random(f"urgency {seed}")
        self.is_mixed = self.urgency.random() < 0.5

    def boot(self, worker_id):
        self.generation += 1
        worker = FuzzWorker(self, self.rig.key(worker_id, self.generation), self.roles[worker_id])
        self.workers[worker_id] = worker
        self.rig.hello(worker.key, worker.role, blocks=60)
        self.route()

    def to_router(self, key: WorkerKey, body):
        self.up.append(codec.from_worker.encode(FromWorker(*key, body)))

    def carry(self):
        """Messages to the router: most arrive, some twice, some late, some never."""
        for _ in range(len(self.up)):
            data = self.up.popleft()
            draw = self.rng.random()
            if draw < self.loss:
                continue
            if draw < 2 * self.loss:
                self.up.append(data)
                continue
            for _ in range(2 if draw < 3 * self.loss else 1):
                self.rig.do(self.rig.core.on_message(codec.from_worker.decode(data)))
        self.route()

    def route(self):
        """Commands to the workers: in order, some lost. Those of earlier incarnations go nowhere."""
        for worker in self.workers.values():
            for send in self.rig.sent[worker.key]:
                if self.rng.random() >= self.loss:
                    worker.inbox.append(codec.from_router.encode(send.message))
            self.rig.taken[worker.key] += len(self.rig.sent[worker.key])
            self.rig.sent[worker.key] = []

    def caller(self):
        rng, rig = self.rng, self.rig
        if rng.random() < 0.25 and self.count < 12:
            self.count += 1
            try:
                rig.submit(
                    f"r{self.count}",
                    prompt=rng.randint(1, 40),
                    max_tokens=rng.randint(1, 9),
                    n=rng.choice([1, 1, 2, 3]),
                    timeout_s=rng.choice([2.0, 60.0, 600.0]),
                    **(self.draw_urgency() if self.is_mixed else {}),
                )
            except ServeError:
                return
        open_ids = [name for name in rig.tokens if name not in rig.ends]
        if open_ids and rng.random() < 0.03:
            rig.cancel(rng.choice(open_ids), rng.choice([None, 0, 1]))

    def draw_urgency(self):
        """Some classes, two tenants, and targets that cannot always be kept."""
        draw = self.urgency.choice
        target_s = draw([None, None, 0.2, 1.0, 30.0])
        return {"priority": draw([-1, 0, 0, 1]), "tenant": draw(["", "other"]), "target_ttft_s": target_s}

    def mischief(self):
        rng = self.rng
        worker = self.workers[rng.choice(sorted(self.workers))]
        draw = rng.random()
        if draw < 0.02 * (self.trouble > 0):
            if rng.random() < 0.5:
                self.rig.do(self.rig.core.worker_lost(worker.key.worker_id, "killed"))
            elif rng.random() < 0.2:
                self.to_router(worker.key, Goodbye())
            self.boot(worker.key.worker_id)
        elif draw < 0.04 * (self.trouble > 0):
            worker.is_frozen = not worker.is_frozen
        elif draw < 0.08:
            self.rig.hello(worker.key, worker.role, blocks=60)
            self.to_router(WorkerKey("ghost", "f" * 16), Output([Tokens("r1", 1, 0, 0, (SampledToken(1),))]))

    def step(self):
        self.caller()
        self.mischief()
        for worker_id in sorted(self.workers):
            self.workers[worker_id].work(self.rng, self.trouble)
        self.carry()
        self.rig.wait(self.rng.choice([0.0, 0.01, 0.1, 0.2]))
        self.route()

    def calm(self):
        self.trouble = self.loss = 0.0
        for worker in self.workers.values():
            worker.is_frozen = False
            self.rig.hello(worker.key, worker.role, blocks=60)
        for _ in range(600):
            if len(self.rig.ends) == len(self.rig.tokens):
                return
            for worker_id in sorted(self.workers):
                self.workers[worker_id].work(self.rng, 0.0)
                self.workers[worker_id].beat()
            self.carry()
            self.rig.wait(0.05)
            self.route()
        raise AssertionError(f"never ended: {sorted(set(self.rig.tokens) - set(self.rig.ends))}")


@pytest.mark.parametrize("policy", ["least-loaded", "prefix-affinity"])
@pytest.mark.parametrize("block", range(10))
def test_every_request_ends_once_with_the_right_tokens_whatever_happens(make_rig, policy, block):
    for seed in range(block * 20, block * 20 + 20):
        fuzz = Fuzz(make_rig(policy=policy, local_prefill_max_tokens=seed % 3 * 8), seed)
        try:
            for _ in range(STEPS):
                fuzz.step()
            fuzz.calm()
        except Exception as error:
            raise AssertionError(f"seed {seed}, policy {policy}: {type(error).__name__}: {error}") from error
        rig = fuzz.rig
        codes = {end.error.code for end in rig.ends.values() if end.error}
        refusals = {"rate_limit_exceeded"} if fuzz.is_mixed else set()
        assert codes <= EXPECTED_CODES | refusals, f"seed {seed}: {codes}"
        if not fuzz.had_trouble:
            assert codes <= {"deadline_exceeded"} | refusals, f"seed {seed}: {codes} without a fault"
        assert rig.core.counters.accepted == rig.core.counters.ended == len(rig.ends)
        assert all(not worker.attempts and not worker.used_blocks for worker in rig.core._registry.all())
