"""What must hold at every moment of every run, each promise with its name, and the error that says which one broke.

clients   I1 I2 I3           `journal.py` while it runs, `history.py` from a file     I7 `neighbours.py`
blocks    I4 I5 I6           `watch_blocks.py`
time      I8 I12 I13         `watch_time.py`
messages  I9                 `guarded` here, `watch_messages.py`
router    I1 I11 I14 I15     `watch_router.py`                                         I10 `slow_reader.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

INVARIANTS = {
    "I1": "every accepted request ends exactly once, by its answer or a clean error, and never by waiting for ever",
    "I2": "what a client saw is a prefix of the fault-free run: ids, logprobs and finish reasons",
    "I3": "no token index is skipped, repeated or out of order",
    "I4": "every block of a worker is free, cached or referenced, and its references equal its owners",
    "I5": "a block has one writer, and is not used again before its owner and its transfer have both ended",
    "I6": "the bytes that decode reads are those that the request's tokens give",
    "I7": "no request's output depends on its neighbours",
    "I8": "what belongs to a dead or silent peer is free within a lease, and nothing is held at rest",
    "I9": "late, doubled and unknown messages are ignored and counted, never fatal",
    "I10": "a client that does not read delays nobody else",
    "I11": "every queue and table has a bound and keeps it",
    "I12": "no work starts after its deadline, nor for an attempt that has ended",
    "I13": "ready means that a request sent now would be worked on",
    "I14": "retries keep their budget, a caller's fault is never blamed on a worker, both legs start or none",
    "I15": "whoever drains gets nothing new, finishes the old, and leaves nothing behind",
}


class InvariantBroken(AssertionError):
    """A promise of the system does not hold; the text starts with its name (I1 … I15)."""

    @property
    def name(self) -> str:
        return str(self).split(" ", 1)[0]


def broken(name: str, where: object, what: str, error: Exception) -> InvariantBroken:
    """What to raise from `error`, which breaks invariant `name` unless it has a name of its own."""
    if isinstance(error, InvariantBroken):
        return error
    return InvariantBroken(f"{name} {where}: {what}: {type(error).__name__}: {error}")


@contextmanager
def guarded(name: str, where: object, what: str) -> Iterator[None]:
    """Whatever the code inside raises breaks invariant `name`."""
    try:
        yield
    except Exception as error:
        raise broken(name, where, what, error) from error
