"""Bugs to plant, each of which some invariant must catch. For tests of the checkers only; nothing else imports this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..decode_node.preemption import Preemption
from ..decode_node.role import DecodeRole
from ..engine.parking import Parking
from ..kvtransfer.effects import SendMessage
from ..kvtransfer.source import SourceTable
from ..prefill_node.role import PrefillRole
from ..protocol.messages import Failed
from ..worker.admission import release


@contextmanager
def _patched(owner: type, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _free_early(original: Any) -> Any:
    def advance(self: PrefillRole, task: Any, entry: Any, tokens: Any, now: float) -> None:
        original(self, task, entry, tokens, now)
        if entry.sample and task.seq.block_table:
            release(task.seq, self._pool)

    return advance


def _lose_failed(original: Any) -> Any:
    def give_up(self: SourceTable, *args: Any, **kwargs: Any) -> Any:
        effects = original(self, *args, **kwargs)
        return [e for e in effects if not (isinstance(e, SendMessage) and isinstance(e.message, Failed))]

    return give_up


def _skip_index(original: Any) -> Any:
    def accept(self: DecodeRole, group: Any, seq: Any, token: Any) -> None:
        original(self, group, seq, token)
        if self._items and self._items[-1].index == 2:
            self._items.pop()

    return accept


def _park_late(original: Any) -> Any:
    def park(self: Preemption, seq: Any, parking: Any) -> None:
        table, computed, published = list(seq.block_table), seq.num_computed_tokens, seq.num_published_blocks
        release(seq, self._pool)
        seq.block_table, seq.num_computed_tokens = table, computed
        original(self, seq, parking)
        seq.block_table, seq.num_published_blocks = [], published

    return park


def _park_leak(original: Any) -> Any:
    return lambda self, seq: None


def _park_unchecked(original: Any) -> Any:
    def copy_back(self: Parking, *args: Any) -> bool:
        original(self, *args)
        return True

    return copy_back


BUGS: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    # blocks go back when they are pushed, not when they are acknowledged
    "free-early": (PrefillRole, "_advance", _free_early),
    "lose-failed": (SourceTable, "_give_up", _lose_failed),  # a hand-off ends at its source and nobody tells decode
    "park-late": (Preemption, "_park", _park_late),  # blocks are freed before they are copied out
    "park-leak": (Preemption, "drop", _park_leak),  # a sequence that ends while parked keeps its host memory
    "park-unchecked": (Parking, "_copy_back", _park_unchecked),  # what comes back corrupt is used
    "skip-index": (DecodeRole, "_accept", _skip_index),  # one token never reaches the stream
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Run with bug `name` in place."""
    owner, method, wrap = BUGS[name]
    with _patched(owner, method, wrap):
        yield
