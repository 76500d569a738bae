"""Which worker should change its role, by the costs that the router has fitted. Pure: a snapshot in, a decision out.

Both legs of a layout (so many workers of each role) are weighed in the same coin, the share of what they can do:

    prefill   seconds of prompts that come each second, for each worker that computes prompts; expected TTFT / target
    decode    output tokens that come each second over those that a worker gives at the target of time per token (or
              with a full KV cache), for each worker that decodes; expected time per token / target

The strain of a layout is the larger. A worker changes its role where that makes the strain smaller by `MIN_GAIN`, one
worker at a time, and not back within `COOLDOWN_S` unless requests starve. Nothing happens below `IDLE_STRAIN`: where
both legs have room, nothing is to be gained.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..core.ids import WorkerKey
from ..protocol.messages import Role

MIN_GAIN = 0.15  # of the strain
IDLE_STRAIN = 0.4
STARVED = 1.5  # a strain at which requests pile up: then a change may be undone at once
PAUSE_S = 5.0  # between changes
COOLDOWN_S = 60.0  # before a change in the other direction
HORIZON_S = 30.0  # for which a leg that is overloaded is expected to stay so
MIX_PENALTY = 0.3  # where prompts are computed among streams: each pauses for whole chunks, which no mean shows
MIN_REQUESTS = 20  # in the window; fewer say nothing of a load
MIN_COMPUTED = 8

ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
LEANING: dict[Role, int] = {"decode": 0, "both": 1, "prefill": 2}  # towards prefill


@dataclass(frozen=True, slots=True)
class Demand:
    """What comes, from a sliding window, and what has piled up."""

    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float  # offered: requests times tokens of an answer
    prefill_s: float  # a prompt's, with the cached tokens taken off
    transfer_s: float
    context_tokens: float  # of a stream in the middle of its answer
    backlog_s: float  # of prompts that wait
    num_streams: int  # that have had their first token
    num_requests: int  # that the window has seen
    num_computed: int


@dataclass(frozen=True, slots=True)
class Costs:
    """The fitted time per token: base_s + streams x stream_s, with `stream_s` for a stream of the demand's context."""

    base_s: float
    stream_s: float
    stall: float  # seconds that a stream is held up by each second of prefill on its worker
    kv_tokens: float  # that a worker holds
    max_streams: int  # in a worker's batch
    target_ttft_s: float
    target_tpot_s: float


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that is ready. `busy` orders workers of a role: the least busy one changes."""

    key: WorkerKey
    role: Role
    busy: float = 0.0
    is_fixed: bool = False  # on its way to another role, or not to be touched


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many workers of a role have to stay. Those for both count for each."""

    min_prefill: int = 1
    min_decode: int = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`may_mix`: the policy weighs on which worker a prompt harms streams least, so a worker may be for both."""

    now: float
    members: tuple[Member, ...]
    demand: Demand
    costs: Costs
    bounds: Bounds = Bounds()
    may_mix: bool = True


class Layout(NamedTuple):
    num_prefill: int
    num_decode: int
    num_both: int

    def __str__(self) -> str:
        parts = ((self.num_prefill, "P"), (self.num_decode, "D"), (self.num_both, "B"))
        return "+".join(f"{count}{role}" for count, role in parts if count)


class Strain(NamedTuple):
    """Shares of what each leg can do, and the predictions behind them."""

    prefill: float
    decode: float
    ttft_s: float
    tpot_s: float
    total: float


@dataclass(frozen=True, slots=True)
class Change:
    worker: WorkerKey
    before: Role
    after: Role
    reason: str


def strain_of(layout: Layout, demand: Demand, costs: Costs) -> Strain:
    """What the model expects of `layout` under this demand."""
    # Without a worker for prompts, those that decode compute them.
    p, d, b = layout if layout.num_prefill + layout.num_both else Layout(0, 0, layout.num_decode)
    prompts = demand.requests_per_s * demand.prefill_s  # workers' worth of prompts
    most = most_streams(demand, costs)
    answers = max(
        demand.output_tokens_per_s * _token_s(costs, most) / most,  # workers' worth of streams
        demand.num_streams / most,
    )
    prefill, decode, mixed, beside = _shares(Layout(p, d, b), prompts, answers)
    tpot_s = _tpot_s(demand, costs, d + b, most)
    tpot_s *= 1.0 - beside + beside / max(0.05, 1.0 - costs.stall * mixed)
    ttft_s = _wait_s(prefill, p + b, demand) + demand.prefill_s + demand.transfer_s
    late = max(ttft_s / costs.target_ttft_s, tpot_s / costs.target_tpot_s)
    return Strain(prefill, decode, ttft_s, tpot_s, max(prefill, decode, late) * (1.0 + MIX_PENALTY * beside))


def _shares(layout: Layout, prompts: float, answers: float) -> tuple[float, float, float, float]:
    """How busy each leg is, when workers for both take what is too much for the others: prefill, decode, the share of
    its time that such a worker spends on prompts, and the share of streams that it does so beside.
    """
    p, d, b = layout
    if not b:
        return prompts / p, answers / d, 0.0, 0.0
    level = max(prompts / (p + b), answers / (d + b), (prompts + answers) / (p + d + b))
    mixed = max(0.0, prompts - p * level) / b
    if not mixed:
        return prompts / p, answers / (d + b), 0.0, 0.0
    beside = max(0.0, answers - d * level) / answers if answers else 0.0
    return level, level, mixed / max(1.0, level), beside


def most_streams(demand: Demand, costs: Costs) -> float:
    """Streams on a worker at which an answer just keeps its target, or the cache or the batch is full; at least 1."""
    by_target = (costs.target_tpot_s - costs.base_s) / max(costs.stream_s, 1e-9)
    by_memory = costs.kv_tokens / max(demand.context_tokens, 1.0)
    return max(1.0, min(by_target, by_memory, costs.max_streams))


def _token_s(costs: Costs, num_streams: float) -> float:
    return max(1e-6, costs.base_s + num_streams * costs.stream_s)


def _tpot_s(demand: Demand, costs: Costs, num_workers: int, most: float) -> float:
    """With as many streams as the rate keeps alive (Little's law), at most what fits."""
    rate = demand.output_tokens_per_s / max(1, num_workers)
    room = 1.0 - rate * costs.stream_s
    streams = min(most, rate * costs.base_s / room) if room > 0 else most
    return _token_s(costs, max(1.0, streams))


def _wait_s(utilisation: float, num_workers: int, demand: Demand) -> float:
    """Until a prompt begins: what has piled up, what will, and the usual queue (Sakasegawa's form for M/M/n)."""
    usual = min(utilisation, 0.95)
    crowd = math.pow(usual, math.sqrt(2.0 * (num_workers + 1)) - 1.0)
    queue_s = demand.prefill_s * crowd / (num_workers * (1.0 - usual))
    return demand.backlog_s / num_workers + max(0.0, utilisation - 1.0) * HORIZON_S + queue_s


class Planner:
    """Remembers when it changed what, and nothing of the load."""

    def __init__(self) -> None:
        self._changed_at = -math.inf
        self._leant = 0  # of the last change: towards prefill or away from it

    def decide(self, snapshot: Snapshot) -> Change | None:
        """The one change that is worth making now. The caller carries it out."""
        now, demand = snapshot.now, snapshot.demand
        if len(snapshot.members) < 2 or now - self._changed_at < PAUSE_S:
            return None
        if demand.num_requests < MIN_REQUESTS or demand.num_computed < MIN_COMPUTED:
            return None
        layout = layout_of(snapshot.members)
        if not layout.num_decode + layout.num_both:
            return None
        current = strain_of(layout, demand, snapshot.costs)
        if current.total < IDLE_STRAIN:
            return None
        found = self._best(snapshot, layout, current)
        if found is None:
            return None
        change, leant = found
        self._changed_at, self._leant = now, leant
        return change

    def _best(self, snapshot: Snapshot, layout: Layout, current: Strain) -> tuple[Change, int] | None:
        best: tuple[float, Member, Role, Layout, Strain] | None = None
        for member, role, after in _candidates(snapshot, layout):
            leant = LEANING[role] - LEANING[member.role]
            if self._undoes(leant, snapshot.now) and current.total < STARVED:
                continue
            strain = strain_of(after, snapshot.demand, snapshot.costs)
            if strain.total <= current.total * (1.0 - MIN_GAIN) and (best is None or strain.total < best[0]):
                best = strain.total, member, role, after, strain
        if best is None:
            return None
        _, member, role, after, strain = best
        reason = _reason(snapshot.demand, (layout, current), (after, strain))
        return Change(member.key, member.role, role, reason), LEANING[role] - LEANING[member.role]

    def _undoes(self, leant: int, now: float) -> bool:
        return leant * self._leant < 0 and now - self._changed_at < COOLDOWN_S


def layout_of(members: tuple[Member, ...]) -> Layout:
    counts = Counter(member.role for member in members)
    return Layout(*(counts[role] for role in ROLES))


def _candidates(snapshot: Snapshot, layout: Layout) -> Iterator[tuple[Member, Role, Layout]]:
    """Every change of the least busy worker of each role that leaves enough of both legs."""
    for before in ROLES:
        free = [member for member in snapshot.members if member.role == before and not member.is_fixed]
        if not free:
            continue
        member = min(free, key=lambda each: (each.busy, each.key))
        for after in ROLES if snapshot.may_mix else ROLES[:2]:
            changed = _changed(layout, before, after)
            if after != before and _keeps(changed, snapshot.bounds):
                yield member, after, changed


def _changed(layout: Layout, before: Role, after: Role) -> Layout:
    counts = list(layout)
    counts[ROLES.index(before)] -= 1
    counts[ROLES.index(after)] += 1
    return Layout(*counts)


def _keeps(layout: Layout, bounds: Bounds) -> bool:
    decodes = layout.num_decode + layout.num_both
    return decodes >= max(1, bounds.min_decode) and layout.num_prefill + layout.num_both >= bounds.min_prefill


def _reason(demand: Demand, before: tuple[Layout, Strain], after: tuple[Layout, Strain]) -> str:
    (old, was), (new, will) = before, after
    return (
        f"{old} at prefill {was.prefill:.0%}, decode {was.decode:.0%}, TTFT {was.ttft_s:.2f} s, "
        f"{was.tpot_s * 1e3:.1f} ms a token; expected of {new}: prefill {will.prefill:.0%}, decode {will.decode:.0%}, "
        f"TTFT {will.ttft_s:.2f} s, {will.tpot_s * 1e3:.1f} ms a token; load: {demand.requests_per_s:.2f} requests/s, "
        f"{demand.prompt_tokens_per_s:.0f} prompt tokens/s, {demand.output_tokens_per_s:.0f} output tokens/s"
    )
