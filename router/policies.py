"""Choosing one of several workers that could all do it. The same choice for the same input and seed, in any process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from ..core.ids import WorkerKey
from .config import RouterConfig


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as a policy sees it.

    cost_tokens: prompt tokens sent there and not yet computed plus tokens held there, as the router itself counts them.
    reported: sequences by the last heartbeat. matched_tokens: leading prompt tokens it probably holds.
    """

    worker: WorkerKey
    cost_tokens: int = 0
    reported: int = 0
    matched_tokens: int = 0


class Ask(NamedTuple):
    """What is to be placed: tokens to compute before the next can be sampled, and whose conversation it is."""

    num_tokens: int = 0
    session: str = ""


NOTHING = Ask()


class Policy(Protocol):
    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        """One of at least one candidate."""
        ...


def _load(candidate: Candidate) -> tuple[int, int, WorkerKey]:
    return candidate.cost_tokens, candidate.reported, candidate.worker


class RoundRobin:
    """The next worker id after the last one picked."""

    def __init__(self) -> None:
        self._last = ""

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        ordered = sorted(candidates, key=lambda candidate: candidate.worker)
        later = [candidate for candidate in ordered if candidate.worker.worker_id > self._last]
        picked = (later or ordered)[0]
        self._last = picked.worker.worker_id
        return picked


class Random:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        return self._random.choice(sorted(candidates, key=lambda candidate: candidate.worker))


class PowerOfTwo:
    """The less loaded of two drawn at random: nearly as even as comparing all, and no herd follows one stale figure."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        ordered = sorted(candidates, key=lambda candidate: candidate.worker)
        return min(self._random.sample(ordered, min(2, len(ordered))), key=_load)


class LeastLoaded:
    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        return min(candidates, key=_load)


class PrefixAffinity:
    """The longest match, unless its worker carries `max_imbalance_tokens` more than the idlest; without a match the
    idlest.
    """

    def __init__(self, max_imbalance_tokens: int) -> None:
        self._max_imbalance_tokens = max_imbalance_tokens

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        idlest = min(candidates, key=_load)
        nearest = min(candidates, key=lambda candidate: (-candidate.matched_tokens, *_load(candidate)))
        if nearest.cost_tokens - idlest.cost_tokens > self._max_imbalance_tokens:
            return idlest
        return nearest


class KvOverlap:
    """The least work in tokens: what the worker carries already plus what it would have to compute of this prompt."""

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        return min(
            candidates, key=lambda c: (c.cost_tokens + max(0, ask.num_tokens - c.matched_tokens), c.reported, c.worker)
        )


class SessionAffinity:
    """The same worker for the same session while it is there and not overloaded. Others keep theirs when one leaves:
    each session ranks the workers by a hash of its own. Without a session the least loaded.
    """

    def __init__(self, max_imbalance_tokens: int) -> None:
        self._max_imbalance_tokens = max_imbalance_tokens

    def pick(self, candidates: Sequence[Candidate], ask: Ask = NOTHING) -> Candidate:
        idlest = min(candidates, key=_load)
        if not ask.session:
            return idlest
        home = max(candidates, key=lambda candidate: _preference(ask.session, candidate.worker))
        if home.cost_tokens - idlest.cost_tokens > self._max_imbalance_tokens:
            return idlest
        return home


def _preference(session: str, worker: WorkerKey) -> bytes:
    parts = (session.encode(errors="replace"), worker.worker_id.encode())
    return blake2b(b"".join(len(part).to_bytes(4, "little") + part for part in parts), digest_size=16).digest()


def make_policy(config: RouterConfig, seed: str = "") -> Policy:
    """A fresh policy; each role of workers has its own. `auto` weighs both roles at once and is not among them: its
    place is taken by the work in tokens.
    """
    match config.policy:
        case "round-robin":
            return RoundRobin()
        case "random":
            return Random(seed)
        case "power-of-two":
            return PowerOfTwo(seed)
        case "least-loaded":
            return LeastLoaded()
        case "prefix-affinity":
            return PrefixAffinity(config.max_imbalance_tokens)
        case "session-affinity":
            return SessionAffinity(config.max_imbalance_tokens)
        case "kv-overlap" | "auto":
            return KvOverlap()
