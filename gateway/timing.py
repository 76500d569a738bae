"""When things happened to one router request, and the phases of its first token. Seconds of the gateway's clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.clock import Clock
from ..protocol.messages import Phases
from ..router.interface import Routing, TokensEvent
from .explain.parts import ITL_PARTS, TTFT_PARTS, Marks, Microseconds, split_gap, split_ttft

NO_PHASES = Phases()


@dataclass(frozen=True, slots=True)
class SinceBefore:
    """Since the tokens before: of the request, and of this choice with where it went; None for the first."""

    gap_s: float | None
    parts_us: Microseconds | None


@dataclass(slots=True)
class RequestTiming:
    """Filled while the request runs. The phases of the first token add up to `ttft_s`; what none claims is `other`."""

    clock: Clock
    received_s: float
    submitted_s: float = 0.0
    first_token_s: float | None = None
    written_s: float | None = None  # the first piece of a stream
    last_token_s: float = 0.0
    ended_s: float | None = None
    phases: Phases = NO_PHASES
    routing: Routing | None = None
    route_s: float = 0.0
    attempts: int = 1
    resumed: int = 0
    num_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    itl_us: list[int] = field(default_factory=lambda: [0] * len(ITL_PARTS))
    _last_of: dict[int, float] = field(default_factory=dict)  # choice → when its last tokens were taken

    def mark_submitted(self) -> None:
        self.submitted_s = self.clock.now()

    def mark_tokens(self, event: TokensEvent) -> SinceBefore:
        """Count the event's tokens, of which there are some."""
        now = self.clock.now()
        gap_s = None if self.first_token_s is None else now - self.last_token_s
        if self.first_token_s is None:
            self.first_token_s = now
            self.phases, self.routing = event.phases or self.phases, event.routing
        self.last_token_s = now
        self.num_tokens += len(event.tokens)
        return SinceBefore(gap_s, self._split_gap(event, now))

    def _split_gap(self, event: TokensEvent, now: float) -> Microseconds | None:
        before = self._last_of.get(event.choice)
        self._last_of[event.choice] = now
        if before is None:
            return None
        parts_us = split_gap(now - before, event.wait_s, event.step)
        for number, part in enumerate(parts_us):
            self.itl_us[number] += part
        return parts_us

    def mark_written(self) -> None:
        """A piece of the answer is with the client's connection. Only the first one counts."""
        if self.written_s is None:
            self.written_s = self.clock.now()

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
    def residence_s(self) -> float:
        """First token to last."""
        return 0.0 if self.first_token_s is None else self.last_token_s - self.first_token_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two."""
        if self.first_token_s is None or self.num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_tokens - 1)

    def ttft_us(self) -> Microseconds:
        """The time to the first piece of the answer by parts, see `explain.parts`; zeros without a token."""
        if self.first_token_s is None:
            return (0,) * len(TTFT_PARTS)
        marks = Marks(self.received_s, self.submitted_s, self.first_token_s, self.written_s)
        return split_ttft(marks, self.phases, self.routing)

    def report(self) -> dict[str, object]:
        """The vendor part of an answer, in milliseconds. The `_ms` up to other_ms add up to ttft_ms, the parts of
        `ttft` to first_piece_ms, those of `itl` to all gaps between tokens together.
        """
        ttft_us = self.ttft_us()
        return {
            **self.coarse_ms(),
            "ttft_ms": _ms(self.ttft_s or 0.0),
            "decode_ms": _ms(self.residence_s),
            "e2e_ms": _ms(self.e2e_s),
            "cached_tokens": self.phases.cached_tokens,
            "transferred_blocks": self.phases.transferred_blocks,
            "transferred_bytes": self.phases.transferred_bytes,
            "attempts": self.attempts,
            "resumed": self.resumed,
            "first_piece_ms": sum(ttft_us) / 1e3,
            "ttft": dict(zip(TTFT_PARTS, (part / 1e3 for part in ttft_us), strict=True)),
            "itl": dict(zip(ITL_PARTS, (part / 1e3 for part in self.itl_us), strict=True)),
        }

    def coarse_ms(self) -> dict[str, float]:
        """The time to the first token in six parts: `queue` is prefill's, `route` ends with the last dispatch."""
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
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
