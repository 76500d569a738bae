"""A cluster of real processes under load, struck at random moments; then what its clients saw, and what is left of it.

1. every body once, undisturbed                       the answers to expect
2. streams kept going; strike, verify, recover        at moments from a seed
3. no further streams; the cluster comes to rest      every block free, nothing leaked
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..worker.fault_signal import ENABLED
from .live_streams import LiveStreams, StreamRecord, undisturbed
from .process_facts import ProcessFacts, facts_of, shared_memory_files
from .process_faults import FaultKind, Struck, lines_since, noticed_after_s, strike, thaw, wait_until
from .serving import Serving

ENVIRONMENT = {ENABLED: "1"}  # for `serving`: the workers must obey
READY_S = 90.0
STRANDED_S = 15.0
GAP_WINDOW_S = 3.0  # which of two faults a gap belongs to: strikes lie further apart
LONGEST_PAUSE_S = 0.8  # between recovery and the next strike

Body = dict[str, Any]
Tell = Callable[[str], None]

_OPENINGS = (
    "The lighthouse",
    "A committee",
    "My grandmother",
    "Every river",
    "The old engine",
    "Nobody",
    "This recipe",
)
_VERBS = ("remembers", "repairs", "explains", "avoids", "collects", "measures", "forgets", "paints", "counts", "sells")
_THINGS = ("letters", "clocks", "bridges", "stories", "maps", "songs", "seeds", "storms", "numbers", "lamps", "shoes")
_PLACES = ("in winter", "by the harbour", "before dawn", "with great care", "without a word", "for the neighbours")


@dataclass(frozen=True, slots=True)
class FaultPlan:
    moments: int
    streams: int
    seed: int = 1
    max_tokens: int = 24
    freeze_s: tuple[float, float] = (2.0, 4.0)
    kinds: tuple[FaultKind, ...] = tuple(FaultKind)


@dataclass(slots=True)
class Moment:
    """One strike: seconds until the router knew, until no survivor held blocks for nobody, until all was as before."""

    struck: Struck
    live_streams: int
    noticed_s: float | None = None
    unstranded_s: float | None = None
    recovered_s: float | None = None

    def __str__(self) -> str:
        seen = "" if self.struck.kind is FaultKind.LINK else f"noticed {_s(self.noticed_s)}, "
        return (
            f"{self.struck.kind} {self.struck.victim} under {self.live_streams} streams: {seen}"
            f"no stranded block after {_s(self.unstranded_s)}, whole again after {_s(self.recovered_s)}"
        )


@dataclass(slots=True)
class FaultResult:
    bodies: list[Body]
    expected: list[StreamRecord]
    calm_gaps: list[float]  # between tokens while the same number of streams ran undisturbed
    moments: list[Moment] = field(default_factory=list)
    records: list[StreamRecord] = field(default_factory=list)
    leaks: dict[str, dict[str, int]] = field(default_factory=dict)  # process → what has grown
    shared_memory_left: list[str] = field(default_factory=list)
    times_lost: int = 0  # how often the router gave a worker up
    seconds: float = 0.0


def make_bodies(count: int, max_tokens: int, seed: int) -> list[Body]:
    """Completion bodies of different lengths and kinds; no two prompts begin alike for long."""
    rng = random.Random(seed)
    return [_body(number, max_tokens, rng) for number in range(count)]


def _sentence(rng: random.Random) -> str:
    words = (rng.choice(_OPENINGS), rng.choice(_VERBS), str(rng.randint(2, 99)), rng.choice(_THINGS))
    return f"{' '.join(words)} {rng.choice(_PLACES)}."


def _body(number: int, max_tokens: int, rng: random.Random) -> Body:
    sentences = [_sentence(rng) for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 12)))]
    kinds: tuple[Body, ...] = (
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.95, "seed": number},
        {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": number, "min_tokens": max_tokens // 2},
        {"temperature": 0.9, "seed": number, "n": 2},
        {"temperature": 0, "stop": [".", "\n"]},
    )
    return {
        "model": "smollm2-135m-instruct",
        "prompt": f"{number}. {' '.join(sentences)} And so",
        "max_tokens": max_tokens - rng.randrange(max_tokens // 3),
        "logprobs": 2,
        "ignore_eos": number % 4 != 3,
    } | kinds[number % len(kinds)]


def run_faults(cluster: Serving, plan: FaultPlan, tell: Tell = lambda _: None) -> FaultResult:
    """Play the plan on a running cluster with ENVIRONMENT. Raises NotStruck, or TimeoutError if it does not recover."""
    began = time.monotonic()
    bodies = make_bodies(plan.streams + max(4, plan.streams // 2), plan.max_tokens, plan.seed)
    expected = undisturbed(cluster, bodies, plan.streams)
    result = FaultResult(bodies, expected, [gap for record in expected for gap in gaps_of(record)])
    tell(f"{len(bodies)} bodies answered undisturbed")
    cluster.wait_rest()
    facts, files = _facts(cluster), shared_memory_files()
    log_offset = cluster.log.stat().st_size
    streams = LiveStreams(cluster, bodies, plan.streams, plan.seed)
    streams.start()
    try:
        _strike_all(cluster, plan, streams, result, tell)
    finally:
        streams.stop()
    result.records = streams.records
    result.times_lost = len(lines_since(cluster, log_offset, r" router .*worker \S+ lost: "))
    wait_whole(cluster)
    cluster.wait_rest(60)
    result.leaks = _leaks(cluster, facts)
    result.shared_memory_left = sorted(shared_memory_files() - files)
    result.seconds = time.monotonic() - began
    return result


def _strike_all(cluster: Serving, plan: FaultPlan, streams: LiveStreams, result: FaultResult, tell: Tell) -> None:
    rng = random.Random(plan.seed)
    names = sorted(cluster.workers())
    order = [(kind, name) for kind in plan.kinds for name in names]
    for number in range(plan.moments):
        if number % len(order) == 0:
            rng.shuffle(order)
        kind, name = order[number % len(order)]
        wait_whole(cluster)
        wait_until(lambda: streams.num_streaming() >= plan.streams // 2, READY_S)
        last = result.moments[-1].struck.at if result.moments else 0.0
        time.sleep(max(0.0, last + GAP_WINDOW_S - time.monotonic()) + rng.random() * LONGEST_PAUSE_S)
        moment = _strike_one(cluster, kind, name, streams.num_streaming(), rng.uniform(*plan.freeze_s))
        result.moments.append(moment)
        tell(f"{number + 1}/{plan.moments} {moment}")


def _strike_one(cluster: Serving, kind: FaultKind, name: str, live_streams: int, freeze_s: float) -> Moment:
    rows = cluster.workers()
    moment = Moment(strike(kind, cluster, rows[name]), live_streams)
    struck = moment.struck
    if kind is not FaultKind.LINK:
        wait_until(lambda: noticed_after_s(cluster, struck) is not None, STRANDED_S)
        moment.noticed_s = noticed_after_s(cluster, struck)
    moment.unstranded_s = _unstranded_after_s(cluster, struck)
    if kind is FaultKind.FREEZE:
        time.sleep(max(0.0, struck.at + freeze_s - time.monotonic()))
        thaw(struck)
    wait_whole(cluster, replaced=struck if kind is FaultKind.KILL else None)
    moment.recovered_s = time.monotonic() - struck.at
    return moment


def held_for_nobody(row: Body) -> int:
    """Blocks in use on a worker beyond those of the attempts that the router wants there. A token that is on its way
    may have opened one more block for each attempt.
    """
    return max(0, int(row["total_blocks"] - row["free_blocks"] - row["expected_blocks"] - row["num_attempts"]))


def _unstranded_after_s(cluster: Serving, struck: Struck) -> float | None:
    """Seconds until each survivor has been seen to hold blocks for wanted attempts only; None when one never was."""
    victims = {struck.victim} if struck.kind is not FaultKind.LINK else set()
    waiting = set(cluster.workers()) - victims
    deadline = struck.at + STRANDED_S
    while waiting and time.monotonic() < deadline:
        waiting -= {name for name, row in cluster.workers().items() if held_for_nobody(row) == 0}
        if waiting:
            time.sleep(0.05)
    return None if waiting else time.monotonic() - struck.at


def wait_whole(cluster: Serving, replaced: Struck | None = None) -> None:
    """Until every worker is ready and linked to each of the other role, and the killed one has a successor. Raises
    TimeoutError.
    """
    if not wait_until(lambda: _is_whole(cluster, replaced), READY_S):
        raise TimeoutError(f"the cluster is not whole again: {cluster.workers()}\n{cluster.tail()}")


def _is_whole(cluster: Serving, replaced: Struck | None) -> bool:
    rows = cluster.workers()
    if replaced is not None and rows.get(replaced.victim, {"epoch": replaced.epoch})["epoch"] == replaced.epoch:
        return False
    roles = {name: row["role"] for name, row in rows.items()}
    return all(
        row["state"] == "ready" and set(row["transports"]) >= {n for n, role in roles.items() if role != row["role"]}
        for row in rows.values()
    )


# ---- what is left


def _facts(cluster: Serving) -> dict[str, ProcessFacts]:
    pids = {name: int(row["pid"]) for name, row in cluster.workers().items()}
    pids |= {"supervisor": cluster.process.pid, "router": _router_pid(cluster, set(pids.values()))}
    return {name: facts_of(pid) for name, pid in pids.items()}


def _router_pid(cluster: Serving, workers: set[int]) -> int:
    """The supervisor's one child that is no worker."""
    tasks = Path("/proc", str(cluster.process.pid), "task").glob("*/children")
    (router,) = {int(pid) for task in tasks for pid in task.read_text().split()} - workers
    return router


def _leaks(cluster: Serving, before: dict[str, ProcessFacts]) -> dict[str, dict[str, int]]:
    """What has grown, looked at until it has not, for a while: a closed connection may take a moment to go."""
    found: dict[str, dict[str, int]] = {}

    def has_none() -> bool:
        nonlocal found
        found = {name: grown for name, now in _facts(cluster).items() if (grown := now.growth(before[name]))}
        return not found

    wait_until(has_none, 10.0)
    return found


# ---- what the clients saw


def gaps_of(record: StreamRecord) -> list[float]:
    return [late - early for early, late in zip(record.times, record.times[1:], strict=False)]


def wrong_answers(result: FaultResult) -> list[str]:
    """One line for each stream that ended well and said something else than undisturbed."""
    wrong = []
    for record in result.records:
        theirs = result.expected[record.body].choices
        if record.error:
            continue
        for number, choice in theirs.items():
            mine = record.choices.get(number)
            difference = "missing" if mine is None else mine.difference(choice)
            if difference:
                wrong.append(f"body {record.body}, choice {number}, resumed {record.resumed}: {difference}")
    return wrong


def resume_gaps(result: FaultResult) -> list[tuple[float, Moment]]:
    """For each resumption, the longest wait for a token around a strike that the stream lived through."""
    found: list[tuple[float, Moment]] = []
    for record in result.records:
        lived = [
            (record.gap_after(m.struck.at, GAP_WINDOW_S), m) for m in result.moments if record.was_live(m.struck.at)
        ]
        lived.sort(key=lambda pair: -pair[0])
        found += [pair for pair in lived[: record.resumed] if pair[0] > 0]
    return found


def _s(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"
