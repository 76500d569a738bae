"""What one request may choose from, after the filters, and what a chooser says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..core.ids import WorkerKey
from .registry import WorkerRecord
from .requests import RequestRecord


class Choice(NamedTuple):
    """Workers for one attempt; without a prefill worker, decode prefills for itself."""

    decode: WorkerRecord
    prefill: WorkerRecord | None


@dataclass(frozen=True, slots=True)
class Options:
    """A snapshot for one decision. Choosers read it and change nothing in it.

    decodes: at least one worker that has room. prefills: free prefill workers, linked to some of them or not.
    prefills_of: those linked to a decode worker; they may be none. may_stay: whether decode may prefill for itself;
    when not, each of `decodes` has a prefill worker. must_stay: it has to. held_tokens: leading tokens of the prompt
    that a worker probably holds when a hand-off ends that begins now; here_tokens: those that it holds already.
    """

    record: RequestRecord
    now: float
    num_tokens: int  # to compute before the next can be sampled, without any cache
    decodes: list[WorkerRecord]
    prefills: list[WorkerRecord]
    prefills_of: Callable[[WorkerRecord], list[WorkerRecord]]
    held_tokens: dict[WorkerKey, int]
    here_tokens: dict[WorkerKey, int]
    may_stay: bool
    must_stay: bool

    @property
    def most_cached(self) -> int:
        """The last token of a prompt is always computed."""
        return max(0, self.num_tokens - 1)

    def held(self, worker: WorkerRecord) -> int:
        """What need not be handed over to it."""
        return min(self.held_tokens.get(worker.key, 0), self.most_cached)

    def here(self, worker: WorkerRecord) -> int:
        """What it need not compute if it begins now."""
        return min(self.here_tokens.get(worker.key, 0), self.most_cached)


class Chooser(Protocol):
    """Picks both workers of an attempt."""

    reads_prefixes: bool  # whether `held_tokens` is worth its hashing

    def choose(self, options: Options) -> Choice: ...
