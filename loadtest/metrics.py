"""From records to figures. docs/LOADTEST.md says what each means; all of it is computed from intended send times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from .record import Record
from .statistics import Distribution, distribution, percentile, wilson
from .steady import Span, concurrency, is_saturated, steady_span

LAG_BOUND_S = 0.010
LAG_BOUND_OF_TARGET = 0.05


@dataclass(frozen=True, slots=True)
class Targets:
    """What a good request keeps; None: no target. Seconds."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def is_empty(self) -> bool:
        return self.ttft_s is None and self.tpot_s is None and self.e2e_s is None

    def is_met(self, record: Record) -> bool:
        """A request without a whole answer keeps none. TPOT of one token is undefined and counts as kept."""
        if not record.is_completed or record.ttft_s is None:
            return False
        return (
            (self.ttft_s is None or record.ttft_s <= self.ttft_s)
            and (self.tpot_s is None or record.tpot_s is None or record.tpot_s <= self.tpot_s)
            and (self.e2e_s is None or record.e2e_s <= self.e2e_s)
        )

    def lag_bound_s(self) -> float:
        """How late the client may be before its figures say more about it than about the server."""
        return max(LAG_BOUND_S, LAG_BOUND_OF_TARGET * (self.ttft_s or 0.0))


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """Whether the client kept up: sends behind schedule, and its own event loop late. Seconds."""

    lag_p50_s: float
    lag_p99_s: float
    loop_lag_p99_s: float
    bound_s: float
    cpu_share: float = 0.0  # processor seconds of the client for each second of the run

    @property
    def is_valid(self) -> bool:
        return self.lag_p99_s <= self.bound_s and self.loop_lag_p99_s <= self.bound_s

    def why_invalid(self) -> str:
        """Empty for a valid run."""
        if self.is_valid:
            return ""
        what, by = ("sent requests", self.lag_p99_s)
        if self.lag_p99_s <= self.bound_s:
            what, by = ("read answers", self.loop_lag_p99_s)
        return f"the client {what} {by * 1e3:.1f} ms late (p99, bound {self.bound_s * 1e3:.1f} ms): figures are its own"


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds; of completed requests."""

    ttft: Distribution
    service_ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution


@dataclass(frozen=True, slots=True)
class Throughput:
    """Per second of `duration_s`."""

    duration_s: float
    completed: int
    input_tokens: int
    output_tokens: int

    @property
    def requests_s(self) -> float:
        return _per(self.completed, self.duration_s)

    @property
    def output_tok_s(self) -> float:
        return _per(self.output_tokens, self.duration_s)

    @property
    def total_tok_s(self) -> float:
        return _per(self.input_tokens + self.output_tokens, self.duration_s)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept all targets, of those sent."""

    good: int
    sent: int
    duration_s: float

    @property
    def requests_s(self) -> float:
        return _per(self.good, self.duration_s)

    @property
    def attainment(self) -> float:
        return _per(self.good, self.sent)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.good, self.sent)


@dataclass(frozen=True, slots=True)
class ServerCounts:
    """What servers say beside times. None: they do not."""

    cached_share: float | None
    acceptance: float | None
    accepted_tokens: int
    rejected_tokens: int
    tokens_per_chunk: float
    num_short_answers: int  # with fewer tokens than planned
    num_counted_by_chunks: int  # answers without usage: each chunk counted as a token
    has_chunk_tokens: bool  # the server counts tokens in every chunk


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures. `steady` are latencies of requests intended within the steady span."""

    sent: int
    offered_rate: float
    latencies: Latencies
    throughput: Throughput
    goodput: Goodput | None
    errors: dict[str, int]
    client: ClientHealth
    counts: ServerCounts
    steady_span: Span | None
    steady: Latencies | None
    steady_throughput: Throughput | None
    peak_concurrency: int
    peak_output_tok_s: float
    is_saturated: bool
    phases: dict[str, Distribution] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        return self.client.is_valid


def summarize(
    records: Sequence[Record], targets: Targets, loop_lags_s: Sequence[float] = (), cpu_share: float = 0.0,
    is_open_loop: bool = True, max_lag_s: float | None = None,
) -> Summary:  # fmt: skip
    """Everything that is known of a run. `records` are all requests sent, in any order; warm-up is not among them."""
    end_s = max((record.end_s for record in records), default=0.0)
    start_s = min((record.asked.intended_s for record in records), default=0.0)
    whole = Span(min(start_s, 0.0), end_s)
    span = steady_span(records)
    inside = [r for r in records if span is not None and span.start_s <= r.asked.intended_s < span.end_s]
    good = sum(targets.is_met(record) for record in records)
    last_intended_s = max((record.asked.intended_s for record in records), default=0.0)
    lags = sorted(record.lag_s for record in records)
    return Summary(
        sent=len(records),
        offered_rate=_per(len(records) - 1, last_intended_s - start_s),
        latencies=latencies(records),
        throughput=throughput(records, whole),
        goodput=None if targets.is_empty else Goodput(good, len(records), whole.length_s),
        errors=dict(sorted(Counter(r.failure.kind.value for r in records if r.failure is not None).items())),
        client=ClientHealth(
            percentile(lags, 50),
            percentile(lags, 99),
            percentile(sorted(loop_lags_s), 99),
            targets.lag_bound_s() if max_lag_s is None else max_lag_s,
            cpu_share,
        ),
        counts=server_counts(records),
        steady_span=span,
        steady=latencies(inside) if inside else None,
        steady_throughput=None if span is None else throughput_within(records, span),
        peak_concurrency=max((level for _, level in concurrency(records)), default=0),
        peak_output_tok_s=float(max(tokens_by_second(records), default=0)),
        is_saturated=is_open_loop and is_saturated(records),
        phases=phases(records),
    )


def latencies(records: Sequence[Record]) -> Latencies:
    done = [record for record in records if record.is_completed]

    def of(value: Callable[[Record], float | None]) -> Distribution:
        return distribution([number for record in done if (number := value(record)) is not None])

    return Latencies(
        ttft=of(lambda r: r.ttft_s),
        service_ttft=of(lambda r: r.service_ttft_s),
        tpot=of(lambda r: r.tpot_s),
        itl=distribution([gap for record in done for gap in record.gaps_s]),
        e2e=of(lambda r: r.e2e_s),
    )


def prompt_tokens(record: Record) -> int:
    """By the server, or as planned where it does not say."""
    return record.asked.prompt_tokens if record.use.prompt_tokens is None else record.use.prompt_tokens


def throughput(records: Sequence[Record], span: Span) -> Throughput:
    """Of completed requests that ended within the span."""
    done = [r for r in records if r.is_completed and span.start_s <= r.end_s <= span.end_s]
    return Throughput(
        span.length_s, len(done), sum(prompt_tokens(r) for r in done), sum(record.output_tokens for record in done)
    )


def throughput_within(records: Sequence[Record], span: Span) -> Throughput:
    """Requests that ended within the span, and the tokens that came within it, whosever they are."""
    ended = throughput(records, span)
    came = sum(n for record in records for at_s, n in token_times(record) if span.start_s <= at_s <= span.end_s)
    return Throughput(span.length_s, ended.completed, ended.input_tokens, round(came))


def token_times(record: Record) -> list[tuple[float, float]]:
    """(time, tokens) of each event; where the server counts none in chunks, its total is shared out evenly."""
    if not record.arrivals:
        return []
    even = record.output_tokens / len(record.arrivals)
    return [(one.at_s, even if one.tokens is None else float(one.tokens)) for one in record.arrivals]


def tokens_by_second(records: Sequence[Record]) -> list[float]:
    """Output tokens in each second of the run."""
    end_s = max((record.end_s for record in records), default=0.0)
    bins = [0.0] * (int(end_s) + 1 if records else 0)
    for record in records:
        for at_s, count in token_times(record):
            bins[min(len(bins) - 1, max(0, int(at_s)))] += count
    return bins


def server_counts(records: Sequence[Record]) -> ServerCounts:
    done = [record for record in records if record.is_completed]
    with_cache = [record for record in done if record.use.cached_tokens is not None]
    cached = sum(record.use.cached_tokens or 0 for record in with_cache)
    accepted = sum(record.use.accepted_tokens or 0 for record in done)
    rejected = sum(record.use.rejected_tokens or 0 for record in done)
    num_chunks = sum(sum(one.tokens != 0 for one in record.arrivals) for record in done)
    return ServerCounts(
        cached_share=_per(cached, sum(prompt_tokens(r) for r in with_cache)) if with_cache else None,
        acceptance=_per(accepted, accepted + rejected) if accepted + rejected else None,
        accepted_tokens=accepted,
        rejected_tokens=rejected,
        tokens_per_chunk=_per(sum(record.output_tokens for record in done), num_chunks),
        num_short_answers=sum(record.output_tokens < record.asked.output_tokens for record in done),
        num_counted_by_chunks=sum(record.use.completion_tokens is None for record in done),
        has_chunk_tokens=bool(done) and all(one.tokens is not None for record in done for one in record.arrivals),
    )


def phases(records: Sequence[Record]) -> dict[str, Distribution]:
    """Penstock's phases in seconds, by name without `_ms`, and `network`: the client's TTFT that no phase explains."""
    reports = [r for r in records if r.is_completed and "ttft_ms" in r.phases]
    names = [name for name in (reports[0].phases if reports else {}) if name.endswith("_ms")]
    found = {
        name.removesuffix("_ms"): distribution([record.phases.get(name, 0.0) / 1e3 for record in reports])
        for name in names
    }
    if reports:
        found["network"] = distribution([(r.service_ttft_s or 0.0) - r.phases["ttft_ms"] / 1e3 for r in reports])
        found["client"] = distribution([record.lag_s for record in reports])
    return found


def ttft_parts(found: dict[str, Distribution]) -> list[str]:
    """Names of the phases that make up the client's TTFT: what the server's report has before its own `ttft_ms`."""
    return ["client", "network", *takewhile(lambda name: name != "ttft", found)] if found else []


def _per(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0
