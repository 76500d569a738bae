"""The fair queue against a slow twin, and its promises: shares, deadlines within a flow, nobody left behind."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.fair_queue import MAX_IDLE_FLOWS, FairQueue, Flow, Turn

FLOWS = {Flow("interactive", "a"): 8.0, Flow("standard", "a"): 4.0, Flow("standard", "b"): 4.0, Flow("batch", "b"): 1.0}


@dataclass
class SlowTwin:
    """The same promises in the plainest words: every answer is looked for among all items, each time."""

    items: dict[int, tuple[Flow, float, float, int]] = field(default_factory=dict)  # flow, cost, deadline, order
    first: dict[int, int] = field(default_factory=dict)
    tags: dict[Flow, float] = field(default_factory=dict)
    order: list[Flow] = field(default_factory=list)
    served: float = 0.0
    count: int = 0

    def add(self, item: int, flow: Flow, cost: float, deadline: float) -> None:
        if not any(entry[0] == flow for entry in self.items.values()):
            self.tags[flow] = max(self.tags.get(flow, 0.0), self.served)
        if flow not in self.order:
            self.order.append(flow)
        self.count += 1
        self.items[item] = (flow, cost, deadline, self.count)

    def next(self) -> int:
        if self.first:
            return min(self.first, key=lambda item: self.first[item])
        flows = {entry[0] for entry in self.items.values()}
        flow = min(flows, key=lambda one: (self.tags[one], self.order.index(one)))
        return min((i for i in self.items if self.items[i][0] == flow), key=lambda i: self.items[i][2:])

    def serve(self) -> int:
        item = self.next()
        if item in self.first:
            del self.first[item]
            return item
        flow, cost, _, _ = self.items.pop(item)
        self.served = max(self.served, self.tags[flow])
        self.tags[flow] += cost / FLOWS[flow]
        return item


def serve_one(queue: FairQueue[int]) -> int:
    taken: list[int] = []

    def take(item: int) -> Turn:
        if taken:
            return Turn.OVER
        taken.append(item)
        return Turn.TAKEN

    queue.offer(take)
    return taken[0]


ADD = st.tuples(st.just("add"), st.sampled_from(sorted(FLOWS)), st.integers(1, 50), st.integers(0, 20))
AGAIN = st.tuples(st.just("again"), st.integers(0, 100))
SERVE = st.tuples(st.just("serve"))
LEAVE = st.tuples(st.just("leave"), st.integers(0, 1000))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(ADD, ADD, AGAIN, SERVE, LEAVE), max_size=60))
def test_queue_serves_what_its_slow_twin_serves(steps):
    queue: FairQueue[int] = FairQueue()
    twin = SlowTwin()
    for number, step in enumerate(steps):
        there = [*twin.first, *twin.items]
        match step:
            case ("add", flow, cost, deadline):
                foreseen = list(queue.ahead(flow, weight=FLOWS[flow], cost=cost, deadline=deadline))
                queue.add(number, flow, weight=FLOWS[flow], cost=float(cost), deadline=float(deadline))
                twin.add(number, flow, float(cost), float(deadline))
                assert foreseen == list(queue)[: list(queue).index(number)]
            case ("again", order):
                queue.add_first(number, 1000 * order + number)
                twin.first[number] = 1000 * order + number
            case ("serve",) if there:
                assert serve_one(queue) == twin.serve()
            case ("leave", which) if there:
                item = there[which % len(there)]
                queue.remove(item)
                twin.items.pop(item, None)
                twin.first.pop(item, None)
        queue.check_invariants()
        assert sorted(queue) == sorted([*twin.first, *twin.items])
        assert len(queue) == len(twin.first) + len(twin.items)
    expected = list(queue)
    assert [serve_one(queue) for _ in range(len(queue))] == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=120, max_size=120), st.sampled_from([1.0, 2.0, 5.0]))
def test_two_flows_that_both_wait_share_by_weight_within_one_item_each(costs, weight):
    """Start-time fair queueing's own bound (Goyal, Vin, Cheng 1996, theorem 1)."""
    queue: FairQueue[int] = FairQueue()
    heavy, light = Flow("heavy", ""), Flow("light", "")
    for number, cost in enumerate(costs):
        flow, share = (heavy, weight) if number % 2 else (light, 1.0)
        queue.add(number, flow, weight=share, cost=float(cost), deadline=0.0)
    served = {0: 0.0, 1: 0.0}
    left = {0: len(costs) // 2, 1: len(costs) // 2}
    bound = max(costs) / weight + max(costs)
    while left[0] and left[1]:
        item = serve_one(queue)
        served[item % 2] += costs[item]
        left[item % 2] -= 1
        assert abs(served[1] / weight - served[0]) <= bound


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_earliest_deadline_goes_first_within_a_flow(deadlines):
    queue: FairQueue[int] = FairQueue()
    for number, deadline in enumerate(deadlines):
        queue.add(number, Flow("standard", ""), weight=1.0, cost=1.0, deadline=deadline)
    order = [serve_one(queue) for _ in deadlines]
    assert order == sorted(range(len(deadlines)), key=lambda number: (deadlines[number], number))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.floats(0.01, 10))
def test_nobody_waits_for_ever_beside_a_flood(cost, weight):
    """While the other flow never runs dry, one item waits for no more than its own share of turns."""
    queue: FairQueue[int] = FairQueue()
    queue.add(-1, Flow("patient", ""), weight=weight, cost=float(cost), deadline=1e9)
    queue.add(0, Flow("flood", ""), weight=1.0, cost=5.0, deadline=0.0)
    for number in range(1, 50):
        if serve_one(queue) == -1:
            break
        queue.add(number, Flow("flood", ""), weight=1.0, cost=5.0, deadline=0.0)
    else:
        raise AssertionError("the patient one starves")
    assert number <= 2, "its tag is that of the last one served, so at most one goes before it"


def test_who_stays_away_saves_up_no_turns():
    queue: FairQueue[int] = FairQueue()
    for number in range(10):
        queue.add(number, Flow("busy", ""), weight=1.0, cost=10.0, deadline=0.0)
    for _ in range(8):
        serve_one(queue)
    for number in range(10, 14):
        queue.add(number, Flow("late", ""), weight=1.0, cost=10.0, deadline=0.0)
    order = [serve_one(queue) for _ in range(4)]
    assert sum(item >= 10 for item in order) == 2


def test_blocked_item_lets_other_flows_go_and_its_own_wait():
    queue: FairQueue[int] = FairQueue()
    for number in range(3):
        queue.add(number, Flow("a", ""), weight=1.0, cost=1.0, deadline=float(number))
        queue.add(number + 10, Flow("b", ""), weight=1.0, cost=1.0, deadline=float(number))
    offered: list[int] = []

    def take(item: int) -> Turn:
        offered.append(item)
        return Turn.BLOCKED if item == 0 else Turn.TAKEN

    queue.offer(take)
    assert offered == [0, 10, 11, 12]
    assert list(queue) == [0, 1, 2]


def test_skipped_item_lets_its_own_flow_go():
    queue: FairQueue[int] = FairQueue()
    for number in range(3):
        queue.add(number, Flow("a", ""), weight=1.0, cost=1.0, deadline=float(number))
    queue.offer(lambda item: Turn.SKIPPED if item == 1 else Turn.TAKEN)
    assert list(queue) == [1]


def test_first_one_without_room_stops_everybody():
    queue: FairQueue[int] = FairQueue()
    queue.add(1, Flow("a", ""), weight=1.0, cost=1.0, deadline=0.0)
    queue.add_first(9, 5)
    queue.add_first(8, 2)
    offered: list[int] = []

    def take(item: int) -> Turn:
        offered.append(item)
        return Turn.BLOCKED

    queue.offer(take)
    assert offered == [8]
    assert list(queue) == [8, 9, 1]


def test_flows_that_left_are_forgotten_in_time():
    queue: FairQueue[int] = FairQueue()
    for number in range(4 * MAX_IDLE_FLOWS):
        queue.add(number, Flow("a", f"tenant {number}"), weight=1.0, cost=1.0, deadline=0.0)
        serve_one(queue)
    assert len(queue._lines) <= MAX_IDLE_FLOWS + 2


@pytest.mark.parametrize("class_name", ["a", "b"])
def test_depth_counts_a_class(class_name):
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        queue.add(number, Flow("a", str(number)), weight=1.0, cost=1.0, deadline=0.0)
    queue.add_first(7, 1)
    assert queue.depth(class_name) == (4 if class_name == "a" else 0)
