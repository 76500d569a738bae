"""A router core with workers played by hand, on a clock that stands still."""

from __future__ import annotations

from collections import defaultdict

import pytest

from penstock.core.ids import SeededIds, WorkerKey
from penstock.protocol.messages import (
    MAX_REQUESTS,
    Abort,
    AttemptFailed,
    Fingerprint,
    FinishReason,
    FromWorker,
    Goodbye,
    Heartbeat,
    Hello,
    Output,
    PrefillEnded,
    Role,
    SampledToken,
    StartDecode,
    StartPrefill,
    Tokens,
    ToRouter,
    WorkerLoad,
    WorkerState,
    unpack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.router.config import RouterConfig
from penstock.router.core import RouterCore
from penstock.router.effects import Deliver, Effect, End, Send
from penstock.router.interface import EndEvent, GenerateRequest, TokensEvent
from penstock.testing.clock import FakeClock

FINGERPRINT = Fingerprint("tiny", "w0", "float32", 2, 2, 8, 4, "block-major")


def key_of(worker_id: str, generation: int = 0) -> WorkerKey:
    return WorkerKey(worker_id, f"{generation:016x}")


def token_at(choice: int, index: int) -> int:
    """The token that a right worker produces there."""
    return 1000 * (choice + 1) + index


class Rig:
    """Feeds the core, keeps what it says, and checks its books and its promises after every input."""

    def __init__(self, **settings: object) -> None:
        self.clock = FakeClock()
        self.core = RouterCore(RouterConfig(**settings), self.clock, SeededIds(7), self.cluster_key)  # type: ignore[arg-type]
        self.sent: dict[WorkerKey, list[Send]] = defaultdict(list)
        self.taken: dict[WorkerKey, int] = defaultdict(int)  # numbered commands already taken out of `sent`
        self.tokens: dict[str, dict[int, list[int]]] = {}
        self.finished: dict[str, dict[int, FinishReason]] = {}
        self.ends: dict[str, EndEvent] = {}
        self.events: dict[str, list[TokensEvent]] = defaultdict(list)
        self.links: dict[WorkerKey, list[WorkerKey]] = {}

    key = staticmethod(key_of)
    token_at = staticmethod(token_at)
    fingerprint = FINGERPRINT
    cluster_key = b"k" * 32

    # ---- inputs

    def do(self, effects: list[Effect]) -> list[Effect]:
        for effect in effects:
            match effect:
                case Send(worker, message):
                    numbers = [send.message.number for send in self.sent[worker] if send.message.number]
                    following = self.taken[worker] + len(numbers) + 1
                    assert message.number in (0, following), "commands are numbered from 1 without a gap"
                    self.sent[worker].append(effect)
                case Deliver(request_id, event):
                    self._on_tokens(request_id, event)
                case End(request_id, end):
                    assert request_id not in self.ends, f"{request_id} ended twice"
                    self.ends[request_id] = end
        self.core.check_invariants()
        return effects

    def say(self, worker: WorkerKey, body: ToRouter) -> list[Effect]:
        return self.do(self.core.on_message(FromWorker(worker.worker_id, worker.epoch, body)))

    def hello(
        self,
        worker: WorkerKey,
        role: Role = "decode",
        *,
        blocks: int = 100,
        longest: int = 1000,
        max_requests: int = MAX_REQUESTS,
        **changes: object,
    ) -> list[Effect]:
        fingerprint = Fingerprint(
            **{name: changes.get(name, getattr(FINGERPRINT, name)) for name in FINGERPRINT.__struct_fields__}  # type: ignore[arg-type]
        )
        facts = (100, fingerprint, blocks, longest, 64, f"/kv/{worker}", ["shm"], max_requests)
        return self.say(worker, Hello(role, *facts))

    def beat(
        self,
        worker: WorkerKey,
        *,
        state: WorkerState = "ready",
        links: list[WorkerKey] | None = None,
        received: int | None = None,
        active: list[tuple[str, int]] | None = None,
        load: WorkerLoad | None = None,
    ) -> list[Effect]:
        """A heartbeat; without more said, of a worker that has everything it was sent."""
        if links is not None:
            self.links[worker] = links
        linked = [(peer.worker_id, peer.epoch, "shm") for peer in self.links.get(worker, [])]
        received = max((send.message.number for send in self.sent[worker]), default=0) if received is None else received
        active = self.live_on(worker) if active is None else active
        return self.say(worker, Heartbeat(received, state, load or WorkerLoad(100, 100), active, linked))

    def join(self, worker_id: str, role: Role = "decode", *, generation: int = 0, **facts: object) -> WorkerKey:
        """A worker that is ready and linked to every prefill worker there is."""
        worker = key_of(worker_id, generation)
        self.hello(worker, role, **facts)  # type: ignore[arg-type]
        rows = [row for row in self.core.status().workers if row.state in ("ready", "starting")]
        links = [WorkerKey(row.worker_id, row.epoch) for row in rows if row.role == "prefill"]
        self.beat(worker, links=links if role != "prefill" else [])
        return worker

    def pair(self) -> tuple[WorkerKey, WorkerKey]:
        """(prefill worker p0, decode worker d0), linked."""
        prefill = self.join("p0", "prefill")
        return prefill, self.join("d0", "decode")

    def submit(
        self,
        request_id: str = "r",
        *,
        prompt: int = 10,
        max_tokens: int = 4,
        n: int = 1,
        timeout_s: float = 60.0,
        **fields: object,
    ) -> list[Effect]:
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request = GenerateRequest(request_id, list(range(prompt)), params, timeout_s, **fields)  # type: ignore[arg-type]
        effects = self.core.submit(request)
        self.tokens[request_id] = {choice: [] for choice in range(n)}
        self.finished[request_id] = {}
        return self.do(effects)

    def cancel(self, request_id: str = "r", choice: int | None = None) -> list[Effect]:
        return self.do(self.core.cancel(request_id, choice))

    def wait(self, seconds: float) -> list[Effect]:
        self.clock.advance(seconds)
        return self.do(self.core.tick())

    def stay(self, seconds: float, *workers: WorkerKey) -> None:
        """Time passes while these workers send their heartbeats."""
        for _ in range(round(seconds / 0.25)):
            self.wait(0.25)
            for worker in workers:
                self.beat(worker)

    # ---- the workers' part

    def start(self, request_id: str = "r") -> tuple[WorkerKey, StartDecode]:
        """The newest StartDecode of a request, and who got it."""
        found = [
            (send.worker, send.message.body)
            for sends in self.sent.values()
            for send in sends
            if isinstance(send.message.body, StartDecode) and send.message.body.request_id == request_id
        ]
        return max(found, key=lambda pair: pair[1].attempt)

    def prefill(self, request_id: str = "r") -> tuple[WorkerKey, StartPrefill]:
        attempt = self.start(request_id)[1].attempt
        return next(
            (send.worker, send.message.body)
            for sends in self.sent.values()
            for send in sends
            if isinstance(send.message.body, StartPrefill)
            and (send.message.body.request_id, send.message.body.attempt) == (request_id, attempt)
        )

    def out(
        self,
        count: int,
        *,
        request_id: str = "r",
        choice: int = 0,
        index: int | None = None,
        end: FinishReason | None = None,
        attempt: int | None = None,
        worker: WorkerKey | None = None,
    ) -> list[Effect]:
        """`count` right tokens of a choice; without an index, those that come next."""
        holder, start = self.start(request_id)
        index = len(self.tokens[request_id][choice]) if index is None else index
        tokens = tuple(SampledToken(token_at(choice, index + i)) for i in range(count))
        item = Tokens(request_id, attempt or start.attempt, choice, index, tokens, end)
        return self.say(worker or holder, Output([item]))

    def prefill_ended(self, ok: bool = True, *, request_id: str = "r", code: str = "") -> list[Effect]:
        worker, start = self.prefill(request_id)
        return self.say(worker, PrefillEnded(request_id, start.attempt, ok, code, code))

    def failed(self, *, retriable: bool, request_id: str = "r", code: str = "transfer_failed") -> list[Effect]:
        worker, start = self.start(request_id)
        return self.say(worker, AttemptFailed(request_id, start.attempt, code, "broken", retriable))

    def goodbye(self, worker: WorkerKey) -> list[Effect]:
        return self.say(worker, Goodbye())

    def live_on(self, worker: WorkerKey) -> list[tuple[str, int]]:
        """What this worker would report as active: started, not aborted, the request not ended."""
        alive: dict[tuple[str, int], None] = {}
        for send in self.sent[worker]:
            body = send.message.body
            if isinstance(body, StartDecode | StartPrefill):
                alive[(body.request_id, body.attempt)] = None
            elif isinstance(body, Abort) and body.choice is None:
                alive.pop((body.request_id, body.attempt), None)
        return [pair for pair in alive if pair[0] not in self.ends]

    def finish(self, request_id: str = "r", *workers: WorkerKey) -> None:
        """Healthy workers bring the request to its end."""
        for _ in range(200):
            if request_id in self.ends:
                return
            for worker in workers:
                self.beat(worker)
            self._answer(request_id)
            self.wait(0.25)
        raise AssertionError(f"{request_id} never ends")

    def aborts(self, worker: WorkerKey) -> list[Abort]:
        return [send.message.body for send in self.sent[worker] if isinstance(send.message.body, Abort)]

    def bodies(self, worker: WorkerKey) -> list[str]:
        return [type(send.message.body).__name__ for send in self.sent[worker]]

    def _answer(self, request_id: str) -> None:
        live = {(row.worker_id, row.epoch) for row in self.core.status().workers if row.state == "ready"}
        try:
            worker, start = self.start(request_id)
        except ValueError:
            return
        if worker not in live:
            return
        for state in start.choices:
            done = len(unpack_ids(state.output_ids))
            count = start.params.max_tokens - done
            tokens = tuple(SampledToken(token_at(state.choice, done + i)) for i in range(count))
            item = Tokens(request_id, start.attempt, state.choice, done, tokens, "length")
            self.say(worker, Output([item]))

    def _on_tokens(self, request_id: str, event: TokensEvent) -> None:
        assert request_id not in self.ends, "tokens after the end"
        have = self.tokens[request_id][event.choice]
        assert event.choice not in self.finished[request_id], "tokens after the finish of a choice"
        assert event.index == len(have), "token index skips or repeats"
        have.extend(token.token_id for token in event.tokens)
        assert have == [token_at(event.choice, i) for i in range(len(have))], "wrong tokens"
        self.events[request_id].append(event)
        if event.finish_reason:
            self.finished[request_id][event.choice] = event.finish_reason


@pytest.fixture
def make_rig() -> type[Rig]:
    return Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()
