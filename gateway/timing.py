"""When things happened to one router request, and the phases of its first token. Seconds of the gateway's clock."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.clock import Clock
from ..protocol.messages import Phases

NO_PHASES = Phases()


@dataclass(slots=True)
class RequestTiming:
    """Filled while the request runs. The phases of the first token add up to `ttft_s`; what none claims is `other`."""

    clock: Clock
    received_s: float
    submitted_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float = 0.0
    ended_s: float | None = None
    phases: Phases = NO_PHASES
    route_s: float = 0.0
    attempts: int = 1
    resumed: int = 0
    num_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def mark_submitted(self) -> None:
        self.submitted_s = self.clock.now()

    def mark_tokens(self, count: int, phases: Phases | None) -> float | None:
        """Count tokens; the gap since the tokens before, None for the first."""
        now = self.clock.now()
        gap = None if self.first_token_s is None else now - self.last_token_s
        if self.first_token_s is None:
            self.first_token_s = now
            self.phases = phases or self.phases
        self.last_token_s = now
        self.num_tokens += count
        return gap

    def mark_end(self, attempts: int, resumed: int, route_s: float) -> None:
        self.ended_s = self.clock.now()
        self.attempts, self.resumed = attempts, resumed
        self.route_s = route_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.received_s

    @property
    def e2e_s(self) -> float:
        return (self.clock.now() if self.ended_s is None else self.ended_s) - self.received_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        if self.first_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)

    def report(self) -> dict[str, float | int]:
        """The vendor part of an answer, in milliseconds; the `_ms` up to other_ms add up to ttft_ms."""
        ttft_s = self.ttft_s or 0.0
        gateway_s = max(0.0, self.submitted_s - self.received_s)
        phases = self.phases
        worker_s = phases.queue_s + phases.prefill_s + phases.transfer_s
        route_s = min(
            self.route_s, max(0.0, ttft_s - gateway_s - worker_s)
        )  # a retry after the first token is not part of TTFT
        return {
            "gateway_ms": _ms(gateway_s),
            "route_ms": _ms(route_s),
            "queue_ms": _ms(phases.queue_s),
            "prefill_ms": _ms(phases.prefill_s),
            "transfer_ms": _ms(phases.transfer_s),
            "other_ms": _ms(max(0.0, ttft_s - gateway_s - route_s - worker_s)),
            "ttft_ms": _ms(ttft_s),
            "decode_ms": _ms(self.last_token_s - self.first_token_s) if self.first_token_s is not None else 0.0,
            "e2e_ms": _ms(self.e2e_s),
            "cached_tokens": phases.cached_tokens,
            "transferred_blocks": phases.transferred_blocks,
            "transferred_bytes": phases.transferred_bytes,
            "attempts": self.attempts,
            "resumed": self.resumed,
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
