"""What has happened of late: requests, gaps between tokens, the workers' state once a second. Bounded, oldest out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ...router.interface import ClusterStatus, WorkerStatus
from .parts import Microseconds

MAX_SPAN_S = 300.0
MAX_REQUESTS = 4096
MAX_GAPS = 16384
MAX_SAMPLES = 301
MAX_SAMPLED_WORKERS = 1024


class RequestFacts(NamedTuple):
    """One request that has had its first token and ended. `at_s`: when the gateway received it, by its clock."""

    request_id: str
    label: str  # what the client calls it
    at_s: float
    ttft_us: Microseconds
    itl_us: Microseconds  # of all its gaps together
    e2e_s: float
    residence_s: float  # first token to last
    work_s: float  # of prefill
    num_prompt_tokens: int
    cached_tokens: int
    num_tokens: int
    decode: str
    prefill: str | None
    transfer_s: float = 0.0
    transferred_bytes: int = 0
    attempts: int = 1
    resumed: int = 0
    error: str = ""
    tenant: str = ""  # who may ask for it by name


class Gap(NamedTuple):
    at_s: float
    parts_us: Microseconds


class WorkerSample(NamedTuple):
    """The sums grow from the worker's start; a new epoch begins again."""

    worker_id: str
    epoch: str
    role: str
    state: str
    busy_s: float
    steps: int
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    queued_tokens: int
    handoffs: int
    free_blocks: int
    total_blocks: int
    block_size: int
    transferred_bytes: int


class Sample(NamedTuple):
    at_s: float
    queued_requests: int
    active_requests: int
    workers: tuple[WorkerSample, ...]


class Window:
    """Fed by the gateway; everything that is read comes with the time from which on it counts."""

    def __init__(
        self, max_requests: int = MAX_REQUESTS, max_gaps: int = MAX_GAPS, max_samples: int = MAX_SAMPLES
    ) -> None:
        self._requests: deque[RequestFacts] = deque(maxlen=max_requests)
        self._gaps: deque[Gap] = deque(maxlen=max_gaps)
        self._samples: deque[Sample] = deque(maxlen=max_samples)

    def note_request(self, facts: RequestFacts) -> None:
        self._requests.append(facts)

    def note_gap(self, at_s: float, parts_us: Microseconds) -> None:
        self._gaps.append(Gap(at_s, parts_us))

    def note_status(self, at_s: float, status: ClusterStatus) -> None:
        workers = tuple(sample_of(worker) for worker in status.workers[:MAX_SAMPLED_WORKERS])
        self._samples.append(Sample(at_s, status.queued_requests, status.active_requests, workers))

    def requests(self, since_s: float) -> list[RequestFacts]:
        """Those that have ended since, in the order in which they were received."""
        ended = (facts for facts in self._requests if facts.at_s + facts.e2e_s >= since_s)
        return sorted(ended, key=lambda facts: facts.at_s)

    def gaps(self, since_s: float) -> list[Gap]:
        return [gap for gap in self._gaps if gap.at_s >= since_s]

    def samples(self, since_s: float) -> list[Sample]:
        return [sample for sample in self._samples if sample.at_s >= since_s]

    def find(self, request_id: str, tenant: str = "") -> list[RequestFacts]:
        """What is known of one call of `tenant`: by the id of its answer, one prompt of it (`…-0`), or the client's own
        label.
        """
        return [facts for facts in self._requests if facts.tenant == tenant and request_id in _names(facts)]


def _names(facts: RequestFacts) -> Iterable[str]:
    return facts.request_id, facts.request_id.rpartition("-")[0], facts.label


def sample_of(worker: WorkerStatus) -> WorkerSample:
    load = worker.load
    return WorkerSample(
        worker.worker_id,
        worker.epoch,
        worker.role,
        worker.state,
        load.busy_s,
        load.steps,
        load.prefill_tokens,
        load.decode_tokens,
        worker.running,
        worker.waiting,
        load.queued_tokens,
        load.receiving + load.handing_off,
        worker.free_blocks,
        worker.total_blocks,
        worker.block_size,
        load.transferred_bytes,
    )
