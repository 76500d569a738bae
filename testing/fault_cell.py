"""One run of one cell of the fault matrix on virtual time.

    start → all ready → requests, the victim among them → the moment → strike → every request ends → (traffic until the
    fault has happened) → all ready again → two more requests → rest → every block free → verify

Whatever does not hold on the way is the reason why the run failed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from ..engine.interface import ScheduledSeq
from ..protocol.sampling import SamplingParams
from ..router.config import RouterConfig
from ..router.interface import GenerateRequest
from .cluster import ClusterShape
from .fault import Aim, Fault, Target
from .fault_cluster import FaultCluster
from .fault_kinds import Kind
from .fault_moments import Moment, MomentWatch
from .journal import InvariantBroken, RequestRecord

VICTIM = "victim"
PROMPT_TOKENS, OUTPUT_TOKENS = 40, 12
TIMEOUT_S = 30.0  # of every request
START_S = 3.0  # until the cluster serves
MOMENT_S = 5.0  # until the moment has come
RETURN_S = 20.0  # until all processes are back
MAX_PROVOKED = 60
LEASE_S = 1.0
REST_S = 1.5 * LEASE_S

NON_RESUMABLE = "the front is the single point that all streams pass through; they end with it (adr/002)"
ENDS_STREAMS = ("kill -9", "SIGTERM", "OOM kill", "disk full")  # of the router's process


@dataclass(frozen=True, slots=True)
class Run:
    """What is done to whom, when, and in a cluster of how many pairs."""

    kind: Kind
    moment: Moment
    target: Target
    num_pairs: int

    @property
    def name(self) -> str:
        pairs = self.num_pairs
        return f"{self.kind.name} of {self.target.value} at {self.moment.value} in {pairs}P{pairs}D"

    @property
    def allowed_code(self) -> str | None:
        """The code of the one clean error that may end a request here, where it is declared non-resumable."""
        return "unavailable" if self.target is Target.ROUTER and self.kind.name in ENDS_STREAMS else None


@dataclass(frozen=True, slots=True)
class RunResult:
    """`outcome`: ok, resumed, error or failed; `why` explains the last two."""

    run: Run
    outcome: str
    why: str = ""
    attempts: int = 0
    recovered_s: float = 0.0  # virtual, from the strike to the victim's end


class RunFailed(Exception):
    """Something that must hold does not; the text says what."""


def shape_of(run: Run) -> ClusterShape:
    return ClusterShape(
        num_prefill=run.num_pairs,
        num_decode=run.num_pairs,
        num_blocks=32,
        max_batch_tokens=16,
        max_running=2 if run.moment.crowd == "decode" else 6,
        lease_s=LEASE_S,
        restart_s=0.3,
        router=RouterConfig(policy="least-loaded", max_attempts=6),
    )


def run_once(run: Run, trace: Callable[[str], None] | None = None) -> RunResult:
    """Play one run; never raises for what the system under test does wrong."""
    play = _Play(run, trace)
    try:
        return play.play()
    except (RunFailed, InvariantBroken) as error:
        return RunResult(run, "failed", str(error))
    except Exception as error:  # noqa: BLE001  a crash of the system under test is a finding like any other
        return RunResult(run, "failed", f"{type(error).__name__}: {error}")
    finally:
        play.close()


class _Play:
    """The state of one run."""

    def __init__(self, run: Run, trace: Callable[[str], None] | None) -> None:
        self._run = run
        self._rng = random.Random(zlib.crc32(run.name.encode()))
        self._cluster = FaultCluster(shape_of(run), self._rng.randrange(1 << 30), trace)
        self._watch = MomentWatch(VICTIM, run.moment, self._cluster.events, self._on_moment)
        self._cluster.observe_step = self._on_step
        self._cluster.fault_tap.on_leave, self._cluster.fault_tap.on_arrive = self._watch.left, self._watch.arrived
        self._fault: Fault | None = None
        self._struck_at = 0.0
        self._submitted: list[str] = []
        self._num_expected = 0

    def close(self) -> None:
        if self._fault is not None:
            self._fault.close()
        self._cluster.close()

    # ---- the story ----

    def play(self) -> RunResult:
        self._until(lambda: self._cluster.is_serving() and self._is_linked(), START_S, "the cluster does not start")
        self._plan()
        self._until(lambda: self._struck_at > 0, MOMENT_S, f"the moment {self._run.moment.value!r} never came")
        self._until(self._all_ended, TIMEOUT_S + 1, "a request hangs past its deadline")
        self._provoke()
        assert self._fault is not None
        self._wait(max(0.0, self._struck_at + self._fault.lasts_s - self._cluster.clock.now()))
        self._until(self._cluster.is_serving, RETURN_S, "not every process came back")
        self._serve_more()
        self._wait(REST_S)
        self._cluster.check_at_rest()
        self._check_router_at_rest()
        if why := self._fault.verify():
            raise RunFailed(f"the fault did not happen: {why}")
        return self._result()

    def _plan(self) -> None:
        """The victim among others, whose number and size make the place full that the moment needs."""
        events = self._cluster.events
        others = _others(self._run, self._rng)
        self._num_expected = 1 + len(others)
        for delay_s, request in others:
            events.after(delay_s, lambda request=request: self._submit(request))  # type: ignore[misc]
        events.after(_victim_delay_s(self._run.moment), self._submit_victim)

    def _submit_victim(self) -> None:
        self._watch.submitting()
        self._submit(make_request(VICTIM, self._rng, PROMPT_TOKENS, OUTPUT_TOKENS))
        self._watch.submitted(self._cluster.router.status().queued_requests)

    def _submit(self, request: GenerateRequest) -> None:
        self._submitted.append(request.request_id)
        self._cluster.submit(request)

    def _on_step(self, worker_id: str, batch: list[ScheduledSeq]) -> None:
        self._watch.computing(batch, 0.5 * self._cluster.engine(worker_id).cost_of(batch))

    def _on_moment(self) -> None:
        aim = Aim(self._run.target, self._watch.prefill, self._watch.decode)
        self._struck_at = self._cluster.clock.now()
        self._cluster.say(f"the moment has come: {self._run.name}")
        self._fault = self._run.kind.make(self._cluster, aim, self._rng)
        if self._run.kind.is_immediate or self._run.moment is Moment.BEFORE_ACCEPT:
            self._fault.strike()
        else:
            # Behind the event that is being handled: a process dies between two events, never inside one.
            self._cluster.events.after(0.0, self._fault.strike)

    def _provoke(self) -> None:
        """Requests of several sizes until the fault has met something to happen to."""
        assert self._fault is not None
        number = 0
        while self._fault.is_pending:
            if number >= MAX_PROVOKED:
                raise RunFailed(f"the fault did not happen: {self._fault.verify()}")
            for _ in range(2 * self._run.num_pairs):
                self._submit(
                    make_request(f"provoke-{number}", self._rng, self._rng.randint(4, 30), self._rng.randint(2, 12))
                )
                number += 1
                self._wait(0.03 * self._rng.random())
        self._until(self._all_ended, TIMEOUT_S + 1, "a later request hangs past its deadline")

    def _serve_more(self) -> None:
        names = ["after-0", "after-1"]
        for name in names:
            self._submit(make_request(name, self._rng, 18, 3))
        self._until(self._all_ended, TIMEOUT_S + 1, "a request after the fault hangs")
        for name in names:
            record = self._cluster.journal.records.get(name)
            if record is None or record.end is None or record.end.error is not None:
                raise RunFailed(f"a request after the fault is not served: {record and record.end}")

    # ---- waiting ----

    def _until(self, is_so: Callable[[], bool], limit_s: float, what: str) -> None:
        cluster = self._cluster
        until = cluster.clock.now() + limit_s
        while not is_so():
            if not cluster.events.run_next() or cluster.clock.now() > until:
                raise RunFailed(f"{what} ({limit_s:g} s)")

    def _wait(self, seconds: float) -> None:
        until = self._cluster.clock.now() + seconds
        while self._cluster.clock.now() < until and self._cluster.events.run_next():
            continue

    # ---- looking ----

    def _is_linked(self) -> bool:
        pairs = self._run.num_pairs
        return all(len(row.transports) == pairs for row in self._cluster.router.status().workers)

    def _all_ended(self) -> bool:
        if self._cluster.is_router_stopped:
            return False
        return len(self._submitted) >= self._num_expected and all(
            record.end is not None for record in self._cluster.journal.records.values()
        )

    def _check_router_at_rest(self) -> None:
        status = self._cluster.router.status()
        if status.active_requests or status.queued_requests:
            raise RunFailed(
                f"the router still holds {status.active_requests} requests, {status.queued_requests} queued"
            )

    def _result(self) -> RunResult:
        run, records = self._run, self._cluster.journal.records
        for request_id in self._submitted:
            self._check_end(request_id, records.get(request_id))
        victim = records.get(VICTIM)
        if victim is None or victim.end is None:
            return RunResult(run, "error", f"refused at the door; {NON_RESUMABLE}")
        recovered_s = max(0.0, self._cluster.ended_at.get(VICTIM, 0.0) - self._struck_at)
        if victim.end.error is not None:
            return RunResult(run, "error", f"{victim.end.error.code}; {NON_RESUMABLE}", 0, recovered_s)
        attempts = victim.end.attempts
        return RunResult(run, "ok" if attempts == 1 else "resumed", "", attempts, recovered_s)

    def _check_end(self, request_id: str, record: RequestRecord | None) -> None:
        """Exact, or the one clean error that is declared."""
        error = record.end.error if record is not None and record.end is not None else None
        code = "unavailable" if record is None else error.code if error is not None else None
        if code is not None and code != self._run.allowed_code:
            raise RunFailed(f"request {request_id} ended with {code}: {error or 'refused at the door'}")


# ---- requests ----


def make_request(request_id: str, rng: random.Random, num_prompt: int, num_output: int, n: int = 1) -> GenerateRequest:
    prompt = [rng.randrange(1, 1000) for _ in range(num_prompt)]
    temperature = rng.choice([0.0, 1.0])
    params = SamplingParams(
        max_tokens=num_output, n=n, temperature=temperature, seed=rng.randrange(1 << 40), ignore_eos=True
    )
    return GenerateRequest(request_id, prompt, params, TIMEOUT_S)


def _others(run: Run, rng: random.Random) -> list[tuple[float, GenerateRequest]]:
    """(when, what) of the requests beside the victim."""
    if run.moment.crowd == "router":
        # Two of them fill three quarters of the books of a decode worker.
        sizes = [(0.0, 52, 16, 1)] * (2 * run.num_pairs)
    elif run.moment.crowd == "decode":
        sizes = [(0.0, 8, 40, 1)] * (2 * run.num_pairs)  # they take all seats for a while
    else:
        sizes = [(0.0, 14, 8, 1), (0.004, 6, 6, 2), (0.03, 9, 6, 1)]
    return [(delay_s, make_request(f"other-{i}", rng, *size)) for i, (delay_s, *size) in enumerate(sizes)]


def _victim_delay_s(moment: Moment) -> float:
    return {"router": 0.001, "decode": 0.04}.get(moment.crowd, 0.01)
