"""Every metric of the HTTP front and of the cluster behind it: names, units and help texts in this one file.

Each application has its own registry. The cluster's gauges are read from the router when /metrics is asked, so they
cost nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..protocol.messages import WorkerLoad
from ..router.interface import ClusterStatus, Decision, Router, WorkerStatus
from .class_metrics import class_metrics
from .explain.parts import ITL_PARTS, TTFT_PARTS
from .timing import RequestTiming

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)

_PHASES = ("gateway", "route", "queue", "prefill", "transfer", "other")

_CLUSTER_GAUGES: dict[str, tuple[str, Callable[[ClusterStatus], float]]] = {
    "penstock_ready": ("1 when the cluster can take requests", lambda s: float(s.ready)),
    "penstock_active_requests": (
        "Requests the router has dispatched and not ended",
        lambda s: float(s.active_requests),
    ),
    "penstock_queued_requests": ("Requests that wait in the router for a worker", lambda s: float(s.queued_requests)),
}
_WORKER_GAUGES = {
    "penstock_worker_running_sequences": ("Sequences in the worker's batch", "running"),
    "penstock_worker_waiting_sequences": ("Sequences that wait in the worker's queue", "waiting"),
    "penstock_worker_receiving_handoffs": ("Hand-offs granted by the worker and not complete", "receiving"),
    "penstock_worker_sending_handoffs": ("Prefills computed and not yet acknowledged by decode", "handing_off"),
    "penstock_worker_queued_prompt_tokens": ("Prompt tokens not yet computed", "queued_tokens"),
    "penstock_worker_kv_blocks": ("KV blocks of the worker's pool", "total_blocks"),
    "penstock_worker_free_kv_blocks": (
        "KV blocks that can be allocated now, retained prefixes included",
        "free_blocks",
    ),
    "penstock_worker_parked_bytes": ("KV bytes of preempted sequences in host memory", "parked_bytes"),
    "penstock_worker_cached_kv_blocks": ("Free KV blocks that hold a retained prefix", "cached_blocks"),
}
_WORKER_COUNTERS = {
    "penstock_worker_steps": ("Engine steps", "steps"),
    "penstock_worker_busy_seconds": ("Time within engine steps", "busy_s"),
    "penstock_worker_prefill_tokens": ("Prompt tokens computed", "prefill_tokens"),
    "penstock_worker_decode_tokens": ("Tokens drawn behind a first one", "decode_tokens"),
    "penstock_worker_preemptions": ("Sequences preempted for lack of KV blocks", "preemptions"),
    "penstock_worker_parked_sequences": ("Preempted sequences copied to host memory", "parked"),
    "penstock_worker_unparked_sequences": ("Preempted sequences copied back from host memory", "unparked"),
    "penstock_worker_corrupt_parked_blocks": (
        "KV blocks that came back from host memory corrupt and were computed again",
        "corrupt_parked_blocks",
    ),
    "penstock_worker_prefix_hit_tokens": ("Prompt tokens found in the prefix cache", "prefix_hit_tokens"),
    "penstock_worker_prefix_query_tokens": ("Prompt tokens looked up in the prefix cache", "prefix_query_tokens"),
    "penstock_worker_transferred_bytes": ("KV bytes moved in hand-offs", "transferred_bytes"),
    "penstock_worker_transferred_blocks": ("KV blocks handed over", "transferred_blocks"),
    "penstock_worker_given_blocks": ("KV blocks handed over where they lay", "given_blocks"),
    "penstock_worker_failed_handoffs": ("Hand-offs that failed", "failed_handoffs"),
    "penstock_worker_stale_messages": ("Messages of ended attempts or lost workers, dropped", "stale_messages"),
    "penstock_worker_drafts": ("Steps of a sequence that verified drafted tokens", "drafts"),
    "penstock_worker_drafted_tokens": ("Drafted tokens that were verified", "drafted_tokens"),
    "penstock_worker_accepted_tokens": ("Drafted tokens that were accepted", "accepted_tokens"),
}
_WORKER_LABELS = ("worker", "role")


class GatewayMetrics:
    """What the gateway counts. One call for each thing that happens."""

    def __init__(self, router: Router) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._requests = Counter("penstock_requests", "HTTP requests answered", ("route", "status"), registry=r)
        self._prompt_tokens = Counter("penstock_prompt_tokens", "Prompt tokens of started requests", registry=r)
        self._cached_tokens = Counter(
            "penstock_cached_prompt_tokens", "Prompt tokens whose KV came from a prefix cache", registry=r
        )
        self._generated = Counter("penstock_generated_tokens", "Output tokens received from workers", registry=r)
        self._retries = Counter("penstock_request_retries", "Attempts after the first of a request", registry=r)
        self._resumed = Counter(
            "penstock_resumed_streams", "Attempts that went on behind tokens already delivered", registry=r
        )
        self._failures = Counter(
            "penstock_failed_requests", "Generations that ended with an error", ("code",), registry=r
        )
        self._disconnects = Counter(
            "penstock_client_disconnects", "Generations cancelled since the client left", registry=r
        )
        self._slow_clients = Counter(
            "penstock_slow_clients_cut", "Streams cut since the client read too slowly", registry=r
        )
        self._running = Gauge("penstock_running_generations", "Generations in progress in this gateway", registry=r)
        self._ttft = Histogram("penstock_ttft_seconds", "Time to the first token", buckets=_SLOW, registry=r)
        self._tpot = Histogram(
            "penstock_tpot_seconds", "Mean time per output token after the first", buckets=_FAST, registry=r
        )
        self._itl = Histogram("penstock_itl_seconds", "Each gap between tokens of a request", buckets=_FAST, registry=r)
        self._e2e = Histogram("penstock_e2e_seconds", "Time of a whole request", buckets=_SLOW, registry=r)
        self._forecast_error = Histogram(
            "penstock_forecast_error_ratio",
            "How far the router's forecast was off: |predicted - measured| / measured",
            ("of",),
            buckets=_RATIOS,
            registry=r,
        )
        self._placed = Counter(
            "penstock_placements", "Answers by where they were prefilled", ("policy", "prefill"), registry=r
        )
        phase = Histogram(
            "penstock_ttft_phase_seconds",
            "Where the time to the first token went",
            ("phase",),
            buckets=_SLOW,
            registry=r,
        )
        self._phases = {name: phase.labels(name) for name in _PHASES}
        self._ttft_parts = Counter(
            "penstock_ttft_part_seconds",
            "Time to the first piece of an answer, by the parts of `penstock explain`",
            ("part",),
            registry=r,
        )
        self._itl_parts = Counter(
            "penstock_itl_part_seconds", "Time between the tokens of a choice, by part", ("part",), registry=r
        )
        r.register(ClusterCollector(router))

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def started(self, num_prompt_tokens: int) -> None:
        self._running.inc()
        self._prompt_tokens.inc(num_prompt_tokens)

    def stopped(self) -> None:
        self._running.dec()

    def tokens(self, count: int, gap_s: float | None) -> None:
        self._generated.inc(count)
        if gap_s is not None:
            self._itl.observe(gap_s)

    def ended(self, timing: RequestTiming) -> None:
        """A router request ended, well or not."""
        self._retries.inc(max(0, timing.attempts - 1))  # none when the request never found a worker
        self._resumed.inc(timing.resumed)
        self._e2e.observe(timing.e2e_s)
        if timing.ttft_s is None:
            return
        self._ttft.observe(timing.ttft_s)
        self._cached_tokens.inc(timing.phases.cached_tokens)
        if timing.tpot_s is not None:
            self._tpot.observe(timing.tpot_s)
        coarse = timing.coarse_ms()
        for name, histogram in self._phases.items():
            histogram.observe(coarse[f"{name}_ms"] / 1e3)
        for name, part in zip(TTFT_PARTS, timing.ttft_us(), strict=True):
            self._ttft_parts.labels(name).inc(part / 1e6)
        for name, part in zip(ITL_PARTS, timing.itl_us, strict=True):
            self._itl_parts.labels(name).inc(part / 1e6)

    def predicted(self, decision: Decision, timing: RequestTiming) -> None:
        """An answer is complete: what was expected of it against what came. Times from submission to the router."""
        self._placed.labels(decision.policy, "remote" if decision.prefill else "local").inc()
        if timing.first_token_s is not None:
            self._observe_error("ttft", decision.ttft_s, timing.first_token_s - timing.submitted_s)
        if timing.tpot_s is not None:
            self._observe_error("tpot", decision.tpot_s, timing.tpot_s)

    def _observe_error(self, of: str, expected_s: float, measured_s: float) -> None:
        if measured_s > 0:
            self._forecast_error.labels(of).observe(abs(expected_s - measured_s) / measured_s)

    def failed(self, code: str) -> None:
        self._failures.labels(code).inc()

    def disconnected(self) -> None:
        self._disconnects.inc()

    def cut_slow_client(self) -> None:
        self._slow_clients.inc()

    def render(self) -> bytes:
        """The text of /metrics."""
        return generate_latest(self.registry)


class ClusterCollector(Collector):
    """Reads the router's status at each scrape."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._router.status()
        yield from _cluster_metrics(status)
        yield from class_metrics(status.classes)
        for name, (text, field) in _WORKER_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=_WORKER_LABELS)
            _add_workers(gauge, status.workers, field)
            yield gauge
        for name, (text, field) in _WORKER_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=_WORKER_LABELS)
            _add_workers(counter, status.workers, field)
            yield counter
        yield _accepted_at(status.workers)


def _cluster_metrics(status: ClusterStatus) -> Iterator[Metric]:
    for name, (text, read) in _CLUSTER_GAUGES.items():
        yield GaugeMetricFamily(name, text, value=read(status))
    state = GaugeMetricFamily(
        "penstock_worker_state", "1 for the state the worker is in", labels=(*_WORKER_LABELS, "state")
    )
    restarts = CounterMetricFamily(
        "penstock_worker_restarts", "Times the worker was started again", labels=_WORKER_LABELS
    )
    for worker in status.workers:
        state.add_metric([worker.worker_id, worker.role, worker.state], 1.0)
        restarts.add_metric([worker.worker_id, worker.role], float(worker.restarts))
    yield state
    yield restarts
    yield _open_breakers(status.workers)
    yield _role_changes(status)


def _open_breakers(workers: list[WorkerStatus]) -> Metric:
    labels = ("worker", "role", "leg")
    family = GaugeMetricFamily("penstock_worker_breaker_open", "1 for a leg that is left alone", labels=labels)
    for worker in workers:
        for leg in ("prefill", "decode"):
            family.add_metric([worker.worker_id, worker.role, leg], float(leg in worker.breakers))
    return family


def _role_changes(status: ClusterStatus) -> Metric:
    family = CounterMetricFamily(
        "penstock_role_changes", "Times that a worker was asked to be for something else", labels=("from", "to", "by")
    )
    for before, after, by, count in status.role_change_counts:
        family.add_metric([before, after, by], float(count))
    return family


def _add_workers(family: GaugeMetricFamily | CounterMetricFamily, workers: list[WorkerStatus], field: str) -> None:
    for worker in workers:
        family.add_metric([worker.worker_id, worker.role], float(_load_value(worker.load, field)))


def _accepted_at(workers: list[WorkerStatus]) -> Metric:
    """By place within the draft, from 0."""
    family = CounterMetricFamily(
        "penstock_worker_accepted_tokens_per_position",
        "Drafted tokens that were accepted, by their place in the draft",
        labels=(*_WORKER_LABELS, "position"),
    )
    for worker in workers:
        for position, count in enumerate(worker.load.accepted_at):
            family.add_metric([worker.worker_id, worker.role, str(position)], float(count))
    return family


def _load_value(load: WorkerLoad, field: str) -> float:
    value: float = getattr(load, field)
    return value
