"""Choosing one of several workers that could all do it. The same choice for the same input, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Policy(Protocol):
    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        """One of at least one candidate."""
        ...


def _load(candidate: Candidate) -> tuple[int, int, WorkerKey]:
    return candidate.cost_tokens, candidate.reported, candidate.worker


class RoundRobin:
    """The next worker id after the last one picked."""

    def __init__(self) -> None:
        self._last = ""

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        ordered = sorted(candidates, key=lambda candidate: candidate.worker)
        later = [candidate for candidate in ordered if candidate.worker.worker_id > self._last]
        picked = (later or ordered)[0]
        self._last = picked.worker.worker_id
        return picked


class LeastLoaded:
    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        return min(candidates, key=_load)


class PrefixAffinity:
    """The longest match, unless its worker carries `max_imbalance_tokens` more than the idlest; without a match the
    idlest.
    """

    def __init__(self, max_imbalance_tokens: int) -> None:
        self._max_imbalance_tokens = max_imbalance_tokens

    def pick(self, candidates: Sequence[Candidate]) -> Candidate:
        idlest = min(candidates, key=_load)
        nearest = min(candidates, key=lambda candidate: (-candidate.matched_tokens, *_load(candidate)))
        if nearest.cost_tokens - idlest.cost_tokens > self._max_imbalance_tokens:
            return idlest
        return nearest


def make_policy(config: RouterConfig) -> Policy:
    """A fresh policy; each role of workers has its own."""
    if config.policy == "round-robin":
        return RoundRobin()
    if config.policy == "least-loaded":
        return LeastLoaded()
    return PrefixAffinity(config.max_imbalance_tokens)
