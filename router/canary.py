"""Canaries: requests of the router's own for one token, by which a worker shows that it works.

They take the way of any request, hand-off included, and are nobody's: no event, no count, no prefix, no cost is kept
of them. A worker gets one when it has become ready, when it has a new role, and now and then while nothing else runs
there. One that fails counts against its workers as any attempt does (`breaker`), and they do not count as ready.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..core.clock import Clock
from ..core.errors import BadRequest, DeadlineExceeded, Overloaded, ServeError, Unavailable
from ..core.ids import IdSource, WorkerKey
from ..protocol.sampling import SamplingParams
from .config import RouterConfig
from .forecast import Forecast
from .interface import GenerateRequest
from .lifecycle import Lifecycle
from .placement import Placement
from .registry import Registry, WorkerRecord
from .requests import RequestRecord

PREFIX = "canary-"  # of their request ids
PROMPT = [0]  # an id that every vocabulary has; too short to fill a block that a prefix cache would keep
TIMEOUT_S = 10.0
NOTHING = Forecast(0.0, 0.0, 0.0, 0.0)

log = logging.getLogger(__name__)


class Canaries:
    """`on_change` hears that a worker has shown that it works, or has failed to."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        ids: IdSource,
        registry: Registry,
        life: Lifecycle,
        on_change: Callable[[], None],
    ) -> None:
        self._config, self._clock, self._ids, self._registry, self._life = config, clock, ids, registry, life
        self._on_change = on_change
        self._running: dict[str, tuple[WorkerKey, ...]] = {}
        life.on_canary = self._ended

    @property
    def is_on(self) -> bool:
        return self._config.canary

    def heard(self, key: WorkerKey) -> None:
        """A heartbeat came: whoever has not shown anything yet is not kept waiting."""
        worker = self._registry.find(key)
        if worker is not None and worker.is_ready and self._life.placer.evidence.missing(worker):
            self.look()

    def look(self) -> None:
        """Send a canary to whoever is due. Prefill workers first: theirs proves a decode worker as well."""
        now = self._clock.now()
        for worker in self._due("prefill", now):
            decode = self._partner(worker)
            if decode is not None:
                self._send(decode, worker, now)
        for worker in self._due("decode", now):
            prefill = next(iter(self._life.placer.linked_prefill(worker)), None)
            if self._config.disaggregate != "always":
                self._send(worker, None, now)
            elif prefill is not None:
                self._send(worker, prefill, now)

    def _due(self, leg: str, now: float) -> list[WorkerRecord]:
        idle_s, evidence = self._config.canary_idle_s, self._life.placer.evidence
        return [
            worker
            for worker in self._registry.live()
            if (worker.hello.role == "prefill") is (leg == "prefill")
            and worker.is_ready
            and worker.has_place
            and not self._is_busy(worker)
            and evidence.is_due(worker, idle_s, now)
        ]

    def _is_busy(self, worker: WorkerRecord) -> bool:
        return any(worker.key in keys for keys in self._running.values())

    def _partner(self, prefill: WorkerRecord) -> WorkerRecord | None:
        """A decode worker that is linked to it; rather one that has shown nothing yet, and the idlest."""
        found = [
            worker
            for worker in self._registry.live()
            if worker.is_ready and worker.can_decode and prefill.key in worker.linked and worker.has_place
        ]
        evidence = self._life.placer.evidence
        return min(found, key=lambda w: (not evidence.missing(w), self._is_busy(w), w.num_streams, w.key), default=None)

    def _send(self, decode: WorkerRecord, prefill: WorkerRecord | None, now: float) -> None:
        name = PREFIX + self._ids.token(8).hex()
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(name, PROMPT, params, TIMEOUT_S, cache_salt=PREFIX)
        self._running[name] = (decode.key, prefill.key) if prefill is not None else (decode.key,)
        self._life.send_canary(request, Placement(decode, prefill, 1, NOTHING), now)

    def _ended(self, record: RequestRecord, error: ServeError | None) -> None:
        """Its workers have shown what they can. One that refuses the prompt itself has answered well enough."""
        now, evidence = self._clock.now(), self._life.placer.evidence
        keys = self._running.pop(record.request_id, ())
        blamed = record.avoid or keys
        for key in keys:
            worker = self._registry.find(key)
            if worker is None or not worker.is_live:
                continue
            if error is None or isinstance(error, BadRequest):
                evidence.note_success(worker, now)
            elif not isinstance(error, Unavailable):  # the router stops
                log.warning("worker %s gives no token: %s", key, error)
                # What is late or refused on a worker with other work says nothing against it.
                is_excused = isinstance(error, DeadlineExceeded | Overloaded) and bool(worker.attempts)
                evidence.note_failure(worker, error, now, is_blamed=key in blamed and not is_excused)
        self._on_change()
