"""Whether a request could be served now, and if not, why."""

from __future__ import annotations

from .config import RouterConfig
from .placement import Placer
from .registry import Registry


class Readiness:
    """At the start the whole cluster has to be there once; later, whatever is left serves."""

    def __init__(self, config: RouterConfig, registry: Registry, placer: Placer) -> None:
        self._config = config
        self._registry = registry
        self._placer = placer
        self._was_complete = False

    def note_change(self) -> None:
        """A worker became ready, or a link came up."""
        self._was_complete = self._was_complete or not self.why_not()

    def why_not(self) -> str:
        """Empty when ready."""
        missing = {worker.key: self._placer.evidence.missing(worker) for worker in self._registry.live()}
        ready = [worker for worker in self._registry.live() if worker.is_ready and not missing[worker.key]]
        others = [worker for worker in self._registry.live() if worker.is_ready and missing[worker.key]]
        why = "".join(f"; worker {worker.key.worker_id} {missing[worker.key]}" for worker in others)
        if not any(worker.can_decode for worker in ready):
            return f"no decode worker is ready{why}"
        if not self._was_complete and len(ready) < self._config.expected_workers:
            return f"{len(ready)} of {self._config.expected_workers} workers are ready{why}"
        if self._needs_pair() and not self._placer.has_pair():
            return "no ready decode worker is linked to a ready prefill worker"
        return ""

    def _needs_pair(self) -> bool:
        if self._config.disaggregate != "auto" or self._was_complete:
            return self._config.disaggregate == "always"
        return any(worker.hello.role == "prefill" for worker in self._registry.live())
