from __future__ import annotations

import random

from penstock.router.timers import Timers


def test_pop_due_returns_keys_in_order_and_disarms_them():
    timers: Timers[str] = Timers()
    for key, when in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        timers.arm(key, when)
    assert timers.next() == 1.0
    assert timers.pop_due(2.0) == ["a", "b"]
    assert (timers.next(), len(timers)) == (3.0, 1)


def test_arm_again_replaces_and_disarm_forgets():
    timers: Timers[str] = Timers()
    timers.arm("a", 1.0)
    timers.arm("a", 5.0)
    assert timers.pop_due(2.0) == []
    timers.arm("a", 3.0)
    timers.arm("a", 5.0)
    assert timers.pop_due(9.0) == ["a"]
    timers.disarm("a")
    assert timers.next() is None


def test_heap_stays_small_and_agrees_with_a_plain_dict():
    rng, timers = random.Random(1), Timers[int]()
    plain: dict[int, float] = {}
    for step in range(20_000):
        key, when = rng.randrange(50), float(rng.randrange(step, step + 100_000))
        if rng.random() < 0.2:
            timers.disarm(key)
            plain.pop(key, None)
        else:
            timers.arm(key, when)
            plain[key] = when
    assert len(timers._heap) <= 2 * len(plain) + 65
    assert timers.pop_due(60_000.0) == sorted((k for k in plain if plain[k] <= 60_000.0), key=lambda k: plain[k])
    assert timers.next() == min(when for when in plain.values() if when > 60_000.0)
