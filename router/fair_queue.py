"""Who of those that wait is next: start-time fair queueing between flows, the earliest deadline first within one.

    first   those that are tried again, in their old order, before everybody else
    flows   each has a start tag, in tokens over weight; the lowest is next. Being served adds cost over weight to it

A flow that begins to wait starts at the tag of what was served last, so nobody saves up turns by staying away. While
two flows both wait, what they have been served differs, over their weights, by no more than one item of each (Goyal,
Vin and Cheng, 1996). Pure: the order depends on what was added, served and removed, and on nothing else.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

MAX_IDLE_FLOWS = 256  # that nothing waits in and that are remembered all the same


class Flow(NamedTuple):
    """Requests that share one place in the order."""

    class_name: str
    tenant: str


class Turn(Enum):
    """What became of an item that was offered."""

    TAKEN = "it is served"
    SKIPPED = "not now, and those behind it may go"
    BLOCKED = "it waits, and so do those behind it in its flow"
    OVER = "nobody else may go before it"


@dataclass(slots=True)
class _Entry(Generic[K]):
    item: K
    cost: float
    due: tuple[float, int]  # deadline, order of coming


@dataclass(slots=True)
class _Line(Generic[K]):
    """The items of one flow, the next one first."""

    number: int
    weight: float
    start: float
    entries: list[_Entry[K]] = field(default_factory=list)


def _due(entry: _Entry[K]) -> tuple[float, int]:
    return entry.due


class FairQueue(Generic[K]):
    """Items compare by identity or value; each is in it once."""

    def __init__(self) -> None:
        self._first: list[_Entry[K]] = []
        self._lines: dict[Flow, _Line[K]] = {}
        self._where: dict[K, Flow | None] = {}  # None: among the first
        self._served = 0.0  # start tag of what was served last
        self._count = 0

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, item: object) -> bool:
        return item in self._where

    def __iter__(self) -> Iterator[K]:
        """In the order in which they would be served if nothing else came."""
        for entry in self._in_turn():
            if entry.item is not None:  # only a probe has none
                yield entry.item

    def depth(self, class_name: str) -> int:
        """Items that wait in flows of this class, without those that are tried again."""
        return sum(len(line.entries) for flow, line in self._lines.items() if flow.class_name == class_name)

    # ---- coming and leaving

    def add(self, item: K, flow: Flow, *, weight: float, cost: float, deadline: float) -> None:
        """`weight` above 0 is the whole flow's from now on. `cost` in tokens, `deadline` in seconds."""
        assert item not in self._where
        line = self._line(flow, weight)
        self._count += 1
        insort(line.entries, _Entry(item, cost, (deadline, self._count)), key=_due)
        self._where[item] = flow

    def add_first(self, item: K, order: int) -> None:
        """One that is tried again: before all flows, and among its like by `order`. It has been paid for."""
        assert item not in self._where
        insort(self._first, _Entry(item, 0.0, (0.0, order)), key=_due)
        self._where[item] = None

    def remove(self, item: K) -> None:
        """It does not want to be served any more; its flow pays nothing."""
        flow = self._where.pop(item)
        entries = self._first if flow is None else self._lines[flow].entries
        del entries[next(place for place, entry in enumerate(entries) if entry.item == item)]

    # ---- serving

    def offer(self, take: Callable[[K], Turn]) -> None:
        """Offer items in turn until all have been or `take` says that it is over. `take` changes nothing in here."""
        for entry in list(self._first):
            turn = take(entry.item)
            if turn is Turn.TAKEN:
                self.remove(entry.item)
            elif turn is not Turn.SKIPPED:
                return  # nobody goes before a stream that someone is reading
        heap = self._heads()
        while heap:
            _, number, place, line = heap[0]
            turn, place = self._offer_line(line, place, take)
            if turn is Turn.OVER:
                return
            if turn is Turn.TAKEN and place < len(line.entries):
                heapq.heapreplace(heap, (line.start, number, place, line))
            else:
                heapq.heappop(heap)

    def _offer_line(self, line: _Line[K], place: int, take: Callable[[K], Turn]) -> tuple[Turn, int]:
        """From `place` on, until one is taken or stops the others. Returns where to go on."""
        while place < len(line.entries):
            entry = line.entries[place]
            turn = take(entry.item)
            if turn is Turn.TAKEN:
                del line.entries[place]
                del self._where[entry.item]
                self._served = max(self._served, line.start)
                line.start += entry.cost / line.weight
            if turn is not Turn.SKIPPED:
                return turn, place
            place += 1
        return Turn.BLOCKED, place

    # ---- looking ahead

    def ahead(self, flow: Flow, *, weight: float, cost: float, deadline: float) -> Iterator[K]:
        """What would be served before an item that came now, in order."""
        probe: _Entry[K | None] = _Entry(None, cost, (deadline, self._count + 1))
        for entry in self._in_turn(flow, probe, weight):
            if entry.item is None:
                return
            yield entry.item

    def _in_turn(
        self, flow: Flow | None = None, probe: _Entry[K | None] | None = None, weight: float = 1.0
    ) -> Iterator[_Entry[K | None]]:
        yield from self._first  # type: ignore[misc]  # a K is a K | None
        lines: list[tuple[float, int, int, float, list[_Entry[K | None]]]] = []
        for name, line in self._lines.items():
            entries: list[_Entry[K | None]] = list(line.entries)  # type: ignore[arg-type]
            if name == flow and probe is not None:
                insort(entries, probe, key=_due)
            if entries:
                start = line.start if line.entries else max(line.start, self._served)
                lines.append((start, line.number, 0, line.weight, entries))
        if probe is not None and flow not in self._lines:
            lines.append((self._served, self._count + 1, 0, weight, [probe]))
        heapq.heapify(lines)
        while lines:
            start, number, place, weight, entries = lines[0]
            yield entries[place]
            if place + 1 < len(entries):
                following = start + entries[place].cost / weight
                heapq.heapreplace(lines, (following, number, place + 1, weight, entries))
            else:
                heapq.heappop(lines)

    # ---- small things

    def _heads(self) -> list[tuple[float, int, int, _Line[K]]]:
        heads = [(line.start, line.number, 0, line) for line in self._lines.values() if line.entries]
        heapq.heapify(heads)
        return heads

    def _line(self, flow: Flow, weight: float) -> _Line[K]:
        line = self._lines.get(flow)
        if line is None:
            if len(self._lines) >= MAX_IDLE_FLOWS:
                self._forget_idle()
            self._count += 1
            line = self._lines[flow] = _Line(self._count, weight, self._served)
        elif not line.entries:
            line.start = max(line.start, self._served)
        line.weight = weight
        return line

    def _forget_idle(self) -> None:
        """First those whose turn would begin anew anyway, then those that are ahead of others by least."""
        idle = [(line.start, line.number, flow) for flow, line in self._lines.items() if not line.entries]
        for _, _, flow in sorted(idle)[: max(0, len(idle) - MAX_IDLE_FLOWS // 2)]:
            del self._lines[flow]

    def check_invariants(self) -> None:
        """Raise AssertionError where the lines and the list of who is where differ. For tests and the simulation."""
        found: dict[K, Flow | None] = {entry.item: None for entry in self._first}
        found |= {entry.item: flow for flow, line in self._lines.items() for entry in line.entries}
        assert found == self._where, "items that wait are in the lines they are said to be in"
        for entries in (self._first, *(line.entries for line in self._lines.values())):
            assert [entry.due for entry in entries] == sorted(entry.due for entry in entries), "a line is in order"
