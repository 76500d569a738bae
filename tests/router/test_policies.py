from __future__ import annotations

from itertools import permutations

import pytest

from penstock.core.ids import WorkerKey
from penstock.router.config import RouterConfig
from penstock.router.policies import (
    Ask,
    Candidate,
    KvOverlap,
    LeastLoaded,
    PowerOfTwo,
    PrefixAffinity,
    Random,
    RoundRobin,
    SessionAffinity,
    make_policy,
)


def candidate(name, cost=0, reported=0, matched=0):
    return Candidate(WorkerKey(name, "0" * 16), cost, reported, matched)


def picked(policy, *candidates):
    return policy.pick(candidates).worker.worker_id


def test_round_robin_takes_turns_whatever_the_order_or_load():
    policy = RoundRobin()
    names = [picked(policy, candidate("b"), candidate("c", cost=9), candidate("a")) for _ in range(6)]
    assert names == ["a", "b", "c", "a", "b", "c"]


def test_round_robin_goes_on_behind_a_worker_that_left():
    policy = RoundRobin()
    assert [picked(policy, candidate("a"), candidate("b")), picked(policy, candidate("a"), candidate("c"))] == [
        "a",
        "c",
    ]


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate("a", 5), candidate("b", 4)], "b"),
        ([candidate("a", 5, 2), candidate("b", 5, 1)], "b"),
        ([candidate("b", 5, 1), candidate("a", 5, 1)], "a"),
        ([candidate("a", 5, 0, 0), candidate("b", 6, 0, 99)], "a"),
    ],
)
def test_least_loaded_compares_tokens_then_reports_then_names(candidates, expected):
    assert {picked(LeastLoaded(), *order) for order in permutations(candidates)} == {expected}


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate("a", 0), candidate("b", 100, 0, 64)], "b"),
        ([candidate("a", 0), candidate("b", 101, 0, 64)], "a"),
        ([candidate("a", 10), candidate("b", 5)], "b"),
        ([candidate("a", 9, 0, 32), candidate("b", 5, 0, 32)], "b"),
        ([candidate("a", 9, 0, 48), candidate("b", 5, 0, 32)], "a"),
    ],
)
def test_prefix_affinity_takes_the_longest_match_within_the_imbalance(candidates, expected):
    assert {picked(PrefixAffinity(100), *order) for order in permutations(candidates)} == {expected}


def test_random_repeats_with_its_seed_and_reaches_everyone():
    workers = [candidate(name) for name in "abcd"]
    draws = [[picked(policy, *workers) for _ in range(100)] for policy in (Random("s"), Random("s"), Random("t"))]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == set("abcd")


def test_power_of_two_never_takes_the_fullest_and_takes_every_other():
    workers = [candidate("a", 3), candidate("b", 1), candidate("c", 2), candidate("d", 9)]
    policy = PowerOfTwo("s")
    names = [picked(policy, *workers) for _ in range(200)]
    assert set(names) == set("abc")
    assert names.count("b") > names.count("c") > names.count("a")
    assert picked(policy, candidate("a", 9)) == "a"


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate("a", 0, 0, 0), candidate("b", 59, 0, 60)], "b"),  # 100 against 59 + 40
        ([candidate("a", 0, 0, 0), candidate("b", 61, 0, 60)], "a"),  # 100 against 61 + 40
        ([candidate("a", 0, 2, 0), candidate("b", 60, 1, 60)], "b"),  # both 100: by reports
        ([candidate("a", 5, 0, 999), candidate("b", 0, 0, 90)], "a"),  # a match beyond the prompt counts as all of it
    ],
)
def test_kv_overlap_adds_what_waits_and_what_is_missing(candidates, expected):
    for order in permutations(candidates):
        assert KvOverlap().pick(order, Ask(100)).worker.worker_id == expected


def test_session_affinity_keeps_sessions_where_they_are_when_others_leave_or_come():
    policy, workers = SessionAffinity(100), [candidate(name) for name in "abcde"]
    homes = {i: policy.pick(workers, Ask(10, f"s{i}")).worker.worker_id for i in range(200)}
    assert set(homes.values()) == set("abcde")
    left = [worker for worker in workers if worker.worker.worker_id != "c"]
    for i, home in homes.items():
        after = policy.pick(left, Ask(10, f"s{i}")).worker.worker_id
        assert (after == home) == (home != "c")


def test_session_affinity_gives_way_to_load_and_needs_a_session():
    policy = SessionAffinity(100)
    workers = [candidate("a"), candidate("b")]
    home = policy.pick(workers, Ask(10, "s")).worker.worker_id
    other = "b" if home == "a" else "a"
    assert picked(policy, candidate("a", 7), candidate("b", 5)) == "b"
    assert policy.pick([candidate(home, 100), candidate(other)], Ask(10, "s")).worker.worker_id == home
    assert policy.pick([candidate(home, 101), candidate(other)], Ask(10, "s")).worker.worker_id == other


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("round-robin", RoundRobin),
        ("random", Random),
        ("power-of-two", PowerOfTwo),
        ("least-loaded", LeastLoaded),
        ("prefix-affinity", PrefixAffinity),
        ("session-affinity", SessionAffinity),
        ("kv-overlap", KvOverlap),
    ],
)
def test_make_policy_knows_every_name(name, kind):
    assert isinstance(make_policy(RouterConfig(policy=name)), kind)


def test_round_robin_spreads_requests_over_workers(make_rig):
    rig = make_rig(policy="round-robin")
    for i in range(3):
        rig.join(f"d{i}", "both")
    holders = []
    for i in range(6):
        rig.submit(f"r{i}")
        holders.append(rig.start(f"r{i}")[0].worker_id)
    assert holders == ["d0", "d1", "d2"] * 2


def test_least_loaded_counts_what_it_sent_before_any_heartbeat(make_rig):
    rig = make_rig(policy="least-loaded")
    for name in ("d0", "d1"):
        rig.join(name, "both", blocks=1000)
    rig.submit("long", prompt=400)
    for i in range(4):
        rig.submit(f"short{i}", prompt=40)
        assert rig.start(f"short{i}")[0] != rig.start("long")[0]


def test_least_loaded_prefill_is_free_again_at_the_first_token(make_rig):
    rig = make_rig(policy="least-loaded")
    for name in ("p0", "p1"):
        rig.join(name, "prefill")
    rig.join("d0", blocks=1000)
    rig.submit("a", prompt=100)
    rig.submit("b", prompt=50)
    assert (rig.prefill("a")[0].worker_id, rig.prefill("b")[0].worker_id) == ("p0", "p1")
    rig.out(1, request_id="a")
    rig.submit("c", prompt=10)
    assert rig.prefill("c")[0].worker_id == "p0"


def test_prefix_affinity_sends_a_shared_prefix_to_the_same_workers(make_rig):
    rig = make_rig(policy="prefix-affinity")
    for name in ("p0", "p1"):
        rig.join(name, "prefill")
    for name in ("d0", "d1"):
        rig.join(name)
    for i in range(6):
        rig.submit(f"r{i}", prompt=40 + i)
    assert len({rig.start(f"r{i}")[0] for i in range(6)}) == 1
    assert len({rig.prefill(f"r{i}")[0] for i in range(6)}) == 1


def test_prefix_affinity_gives_way_when_one_worker_has_too_much(make_rig):
    rig = make_rig(policy="prefix-affinity", max_imbalance_tokens=200)
    for name in ("d0", "d1"):
        rig.join(name, "both", blocks=1000)
    for i in range(8):
        rig.submit(f"r{i}", prompt=40)
    assert len({rig.start(f"r{i}")[0] for i in range(8)}) == 2
