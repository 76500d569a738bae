"""Faults, drawn from a seed.

Each seed picks its own mix (swarm testing: Groce et al., ISSTA 2012), so rare mixes happen too.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from .events import Action, EventQueue

MAX_REMEMBERED = 64  # messages of one way that may come again


@dataclass(frozen=True, slots=True)
class ChaosProfile:
    """Probabilities per message, seconds of delay, and how often workers die. All zero: a perfect network."""

    drop: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.0005
    slow: float = 0.0  # probability of a long delay
    slow_s: float = 0.0
    corrupt: float = 0.0  # of block bytes on their way
    corrupt_parked: float = 0.0  # of a sequence's bytes while they wait in host memory
    cut: float = 0.0  # of a hand-off link, per message on it
    engine_fail: float = 0.0  # of a prefill, at its last chunk
    kills: int = 0
    freezes: int = 0
    hangs: int = 0
    drains: int = 0
    replay: float = 0.0  # of any earlier message on the same way, per message
    replay_s: float = 0.0  # how much later at most
    unknown: float = 0.0  # of a message about something that never was, per message
    by_hand: bool = False  # somebody strikes whom this profile knows nothing of

    @property
    def is_lossless(self) -> bool:
        """Every message arrives once, in order and soon, unless a worker dies."""
        return self.keeps_order and not (self.drop or self.cut or self.freezes or self.hangs or self.unknown)

    @property
    def keeps_order(self) -> bool:
        return not (self.double or self.reorder or self.slow or self.replay or self.by_hand)

    @property
    def is_perfect(self) -> bool:
        """Nothing at all goes wrong, and nobody leaves."""
        return self.is_lossless and not (self.kills or self.drains or self.corrupt or self.engine_fail)

    @classmethod
    def draw(cls, rng: random.Random) -> ChaosProfile:
        """One swarm member: each fault is on with probability one half."""

        def maybe(value: float) -> float:
            return value if rng.random() < 0.5 else 0.0

        return cls(
            drop=maybe(rng.choice([0.002, 0.01, 0.05])),
            double=maybe(rng.choice([0.01, 0.1])),
            reorder=maybe(rng.choice([0.02, 0.2])),
            delay_s=rng.choice([0.0001, 0.001, 0.01]),
            slow=maybe(0.02),
            slow_s=rng.choice([0.2, 1.0, 4.0]),
            corrupt=maybe(0.02),
            cut=maybe(0.005),
            engine_fail=maybe(0.2),
            kills=int(maybe(rng.randint(1, 4))),
            freezes=int(maybe(rng.randint(1, 2))),
            hangs=int(rng.random() < 0.15),
            drains=int(maybe(rng.randint(1, 2))),
            replay=maybe(rng.choice([0.01, 0.1])),
            replay_s=rng.choice([0.02, 0.5, 3.0]),
            unknown=maybe(rng.choice([0.02, 0.3])),
        )


class Wire:
    """One direction of one connection: keeps order unless the profile reorders, and can lose, double and delay."""

    def __init__(self, events: EventQueue, profile: ChaosProfile, rng: random.Random, faults: Counter[str]) -> None:
        self._events, self._profile, self._rng, self._faults = events, profile, rng, faults
        self._last = 0.0
        self._past: list[tuple[str, Action]] = []
        self.is_calm = False

    def carry(self, kind: str, deliver: Action) -> None:
        """Plan `deliver` for later, once, twice or not at all. Faults that happened are counted by kind."""
        profile, rng = self._profile, self._rng
        if not self.is_calm and rng.random() < profile.drop:
            self._faults[f"drop {kind}"] += 1
            return
        self._plan(deliver, kind)
        if not self.is_calm and rng.random() < profile.double:
            self._faults[f"double {kind}"] += 1
            self._plan(deliver, kind)
        if profile.replay and kind != "Heartbeat":
            self._replay(kind, deliver)

    def _replay(self, kind: str, deliver: Action) -> None:
        """Remember this one, and perhaps let one of the earlier ones arrive again, as late as it likes."""
        rng, past = self._rng, self._past
        if past and not self.is_calm and rng.random() < self._profile.replay:
            earlier, action = rng.choice(past)
            self._faults[f"replay {earlier}"] += 1
            self._events.after(rng.random() * self._profile.replay_s, action)
        if len(past) < MAX_REMEMBERED:
            past.append((kind, deliver))
        else:
            past[rng.randrange(MAX_REMEMBERED)] = (kind, deliver)

    def _plan(self, deliver: Action, kind: str) -> None:
        profile, rng, now = self._profile, self._rng, self._events.clock.now()
        moment = now + profile.delay_s * (0.5 + rng.random())
        if not self.is_calm and rng.random() < profile.slow:
            self._faults[f"slow {kind}"] += 1
            moment += profile.slow_s * rng.random()
        if not self.is_calm and rng.random() < profile.reorder:
            self._faults[f"reorder {kind}"] += 1
            moment += 5 * profile.delay_s * rng.random()
        else:
            moment = self._last = max(moment, self._last)
        self._events.after(moment - now, deliver, is_awaited=kind != "Heartbeat")
