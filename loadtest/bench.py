"""A load test from choice to outcome: one run, a search for the highest rate, or several servers in rounds.

Seeds: lengths and arrivals come from `seed`; what prompts say also from a salt, which every run of a search or a
comparison has for itself, so that no run finds in a cache what another has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from ..core.clock import Clock
from ..core.errors import ConfigError
from .choices import ArrivalChoice, WorkloadChoice
from .client import Client
from .comparison import Compared, Leg, Rounds, compare, order
from .explained import Explained, ask_why
from .metrics import Summary, Targets, summarize
from .plan import Workload
from .record import Record
from .rendering import Renderer
from .runner import Recorded, Runner, Schedule, Sleep
from .search import Limits, Probe, ShareSearch
from .sending import RequestForm
from .target import Target, agree_on_form, calibrate, find_target, reset_cache

WARMUP_SALT = 1 << 20
WARMUP_CONCURRENCY = 4

Watch = Callable[[str, Recorded, float], None]  # label of the run, what there is so far, seconds since its start


@dataclass(frozen=True, slots=True)
class Choice:
    """Everything that is the same for all runs of a load test."""

    workload: WorkloadChoice
    arrivals: ArrivalChoice
    form: RequestForm
    targets: Targets = field(default_factory=Targets)
    renderer: Renderer = field(default_factory=Renderer)
    seed: int = 0
    warmup: int = 4
    max_model_len: int | None = None
    max_lag_s: float | None = None
    is_resetting_cache: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One run: which server, at what rate, and what came of it."""

    label: str
    target: Target
    workload: Workload
    arrivals: ArrivalChoice
    records: list[Record]
    summary: Summary
    rate: float = 0.0  # that a search asked for
    num_cut_off: int = 0  # requests under way when the run was interrupted; they are in no figure
    explained: Explained | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The highest rate at which a share of requests keeps the targets."""

    share: float
    rate: float
    is_client_bound: bool
    server: int = 0


@dataclass(slots=True)
class Outcome:
    """What a load test has to tell."""

    choice: Choice
    runs: list[Run] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def is_valid(self) -> bool:
        """A search handles invalid probes by itself; elsewhere one invalid run spoils the outcome."""
        return bool(self.found) or all(run.summary.is_valid for run in self.runs)


class Server:
    """One server, met: its client, its model, the form it takes."""

    def __init__(self, client: Client, target: Target, choice: Choice) -> None:
        self.client, self.target, self.choice = client, target, choice

    @classmethod
    async def meet(cls, client: Client, choice: Choice) -> Server:
        """Raises ConfigError when it does not answer."""
        target = await find_target(client, choice.form.model or None)
        asked = replace(choice.form, model=target.model, is_exact_length=choice.workload.wants_exact_length)
        form = await agree_on_form(client, asked)
        renderer = choice.renderer
        if not form.is_ids:
            renderer = await calibrate(client, form, renderer)
        return cls(client, target, replace(choice, form=form, renderer=renderer))

    def workload(self, count: int | None = None) -> Workload:
        choice = self.choice
        window = choice.max_model_len or self.target.max_model_len
        wanted = choice.workload if count is None else replace(choice.workload, count=count)
        return wanted.build(window, choice.seed, choice.form.endpoint == "chat")


class Bench:
    """Runs things on servers, one at a time. `watch` hears of progress."""

    def __init__(self, clock: Clock, sleep: Sleep = asyncio.sleep, watch: Watch | None = None) -> None:
        self._clock, self._sleep, self._watch = clock, sleep, watch
        self._running: Runner | None = None
        self.is_interrupted = False

    def interrupt(self) -> None:
        """End the run under way with what it has, and begin no other. Call it in the loop's thread."""
        self.is_interrupted = True
        if self._running is not None:
            self._running.stop()

    async def run(
        self,
        server: Server,
        workload: Workload,
        arrivals: ArrivalChoice,
        salt: int = 0,
        label: str = "",
        is_decided: Callable[[Recorded], bool] | None = None,
    ) -> Run:
        """One run behind its warm-up."""
        choice = server.choice
        form = replace(choice.form, is_exact_length=workload.is_exact_length)
        if form.endpoint == "completions" and workload.has_conversations:
            raise ConfigError("--endpoint: conversations of several turns need chat; or give --first-turn-only")
        if choice.is_resetting_cache:
            await reset_cache(server.client)
        await self._warm_up(server, form, workload, salt)
        workload, schedule = arrivals.schedule(workload, choice.seed)
        recorded = await self._perform(self._runner(server, form, salt, label, is_decided), workload, schedule)
        records = recorded.records
        if self.is_interrupted:
            records = [record for record in records if not record.is_given_up]
        summary = summarize(
            records,
            choice.targets,
            recorded.loop_lags_s,
            recorded.cpu_share,
            arrivals.is_open_loop and arrivals.is_steady,
            choice.max_lag_s,
        )
        return Run(
            label,
            server.target,
            workload,
            arrivals,
            records,
            summary,
            num_cut_off=len(recorded.records) - len(records),
            explained=await ask_why(server.client, summary.throughput.duration_s) if records else None,
        )

    async def _perform(self, runner: Runner, workload: Workload, schedule: Schedule) -> Recorded:
        if self.is_interrupted:
            return Recorded()
        self._running = runner
        try:
            return await runner.run(workload, schedule)
        finally:
            self._running = None

    async def search(
        self, servers: Sequence[Server], shares: Sequence[float], limits: Limits, probe: ProbeSize, outcome: Outcome
    ) -> None:
        """The highest rate of each server for each share. Servers take turns, a probe each."""
        searches = [ShareSearch(shares, limits) for _ in servers]
        left = dict(enumerate(servers))
        while left:
            for number, server in list(left.items()):
                rate = searches[number].next_rate()
                if rate is None:
                    del left[number]
                    continue
                run = await self._probe(server, rate, probe, shares, outcome)
                if self.is_interrupted:  # a probe that was cut off says nothing of its rate
                    return
                searches[number].add(probe_of(rate, run.summary))
        for number, search in enumerate(searches):
            outcome.found += [Found(one.share, one.best, one.is_client_bound, number) for one in search.done]

    async def _probe(
        self, server: Server, rate: float, probe: ProbeSize, shares: Sequence[float], outcome: Outcome
    ) -> Run:
        workload = server.workload(probe.count(rate))
        arrivals = server.choice.arrivals.with_rate(rate, workload)
        number = len(outcome.runs) + 1
        label = f"probe {number}, {rate:.3g} requests/s"
        if len(outcome.targets) > 1:
            label += f", {server.target.url}"
        is_decided = missed_for_sure(server.choice.targets, min(shares))
        run = replace(await self.run(server, workload, arrivals, number, label, is_decided), rate=rate)
        outcome.runs.append(run)
        return run

    async def compare(self, servers: Sequence[Server], num_rounds: int, outcome: Outcome) -> None:
        """Interleaved rounds, the first server twice in each."""
        runs: dict[tuple[int, Leg], Run] = {}
        for number in range(num_rounds):
            for leg in order(len(servers), number):
                server = servers[leg.server]
                # The base's second run says other things than its first, or the cache would answer it.
                salt = 2 * number + 1 + leg.is_again
                label = f"round {number + 1}, {server.target.url}{' again' if leg.is_again else ''}"
                run = await self.run(server, server.workload(), server.choice.arrivals, salt, label)
                outcome.runs.append(run)
                runs[number, leg] = run
                if self.is_interrupted:
                    return
        for other in range(1, len(servers)):
            for figure in FIGURES:
                legs = (Leg(0), Leg(0, is_again=True), Leg(other))
                values = [[figure.of(runs[n, leg].summary) for n in range(num_rounds)] for leg in legs]
                if (found := compare(figure.name, other, Rounds(*values), figure.is_less_better)) is not None:
                    outcome.compared.append(found)

    def _runner(
        self,
        server: Server,
        form: RequestForm,
        salt: int,
        label: str,
        is_decided: Callable[[Recorded], bool] | None = None,
    ) -> Runner:
        watch = self._watch
        hear = None if watch is None else lambda recorded, now_s: watch(label, recorded, now_s)
        renderer = replace(server.choice.renderer, salt=server.choice.renderer.salt + salt)
        return Runner(server.client, form, renderer, self._clock, self._sleep, hear, is_decided)

    async def _warm_up(self, server: Server, form: RequestForm, workload: Workload, salt: int) -> None:
        """The same mix of lengths with other words, left out of all figures."""
        if server.choice.warmup:
            some = replace(workload, conversations=workload.conversations[: server.choice.warmup])
            runner = self._runner(server, form, salt + WARMUP_SALT, "warm-up")
            await self._perform(runner, some, Schedule(concurrency=WARMUP_CONCURRENCY))


@dataclass(frozen=True, slots=True)
class ProbeSize:
    """How long a probe lasts: `seconds` of arrivals, with no fewer than `least` requests and no more than `most`."""

    seconds: float = 60.0
    least: int = 100
    most: int = 5000

    def count(self, rate: float) -> int:
        return max(self.least, min(self.most, round(rate * self.seconds)))


def missed_for_sure(targets: Targets, share: float) -> Callable[[Recorded], bool]:
    """True once so many requests have missed the targets that the share cannot be reached by what is left.

    A probe far above the capacity would else keep the server busy for as long as its queue has grown.
    """
    missed = seen = 0

    def is_decided(recorded: Recorded) -> bool:
        nonlocal missed, seen
        missed += sum(not targets.is_met(record) for record in recorded.records[seen:])
        seen = len(recorded.records)
        return missed > (1 - share) * recorded.num_planned

    return is_decided


def probe_of(rate: float, summary: Summary) -> Probe:
    assert summary.goodput is not None, "a search has targets"
    return Probe(rate, summary.goodput.good, summary.sent, summary.is_saturated, summary.is_valid)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure to compare servers by."""

    name: str
    of: Callable[[Summary], float]
    is_less_better: bool = True


FIGURES = (
    Figure("TTFT median", lambda s: s.latencies.ttft.median),
    Figure("TTFT p90", lambda s: s.latencies.ttft.percentiles[90]),
    Figure("TPOT median", lambda s: s.latencies.tpot.median),
    Figure("TPOT p90", lambda s: s.latencies.tpot.percentiles[90]),
    Figure("E2EL median", lambda s: s.latencies.e2e.median),
    Figure("output tok/s", lambda s: s.throughput.output_tok_s, is_less_better=False),
    Figure("goodput", lambda s: s.goodput.requests_s if s.goodput else 0.0, is_less_better=False),
)


@dataclass(frozen=True, slots=True)
class Task:
    """What to do: one run where neither `shares` nor further URLs are given."""

    urls: tuple[str, ...]
    shares: tuple[float, ...] = ()
    limits: Limits = field(default_factory=Limits)
    probe: ProbeSize = field(default_factory=ProbeSize)
    num_rounds: int = 3


async def perform(task: Task, choice: Choice, bench: Bench, open_client: Callable[[str], Client]) -> Outcome:
    """Meet the servers and do the task. Raises ConfigError when a server or a file is not as it has to be."""
    outcome = Outcome(choice)
    async with AsyncExitStack() as stack:
        servers = []
        for url in task.urls:
            client = await stack.enter_async_context(open_client(url))
            servers.append(await Server.meet(client, choice))
        outcome.targets = [server.target for server in servers]
        if task.shares:
            await bench.search(servers, task.shares, task.limits, task.probe, outcome)
        elif len(servers) > 1:
            await bench.compare(servers, task.num_rounds, outcome)
        else:
            server = servers[0]
            outcome.runs.append(await bench.run(server, server.workload(), choice.arrivals, label="run"))
    outcome.is_interrupted = bench.is_interrupted
    return outcome
