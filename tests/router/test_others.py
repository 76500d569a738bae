"""What other routers have on a worker counts when this one looks for room and for the least load."""

from __future__ import annotations

from penstock.core.ids import WorkerKey
from penstock.protocol.messages import AttemptFailed, Heartbeat, OthersLoad, StartDecode, WorkerLoad

NOTHING = OthersLoad()


def beat(rig, worker: WorkerKey, others: OthersLoad | None) -> None:
    active = [(key.request_id, key.attempt) for key in rig.core._registry.find(worker).attempts]
    numbers = [send.message.number for send in rig.sent[worker]]
    received = max([rig.taken[worker], *numbers])
    rig.say(worker, Heartbeat(received, "ready", WorkerLoad(), active, [], others=others))


def worker_with(rig, blocks: int = 100, **more) -> WorkerKey:
    worker = rig.key("decode-0")
    rig.hello(worker, blocks=blocks, **more)
    rig.beat(worker)
    return worker


def starts(rig, worker: WorkerKey) -> list[str]:
    return [s.message.body.request_id for s in rig.sent[worker] if isinstance(s.message.body, StartDecode)]


def test_room_that_others_hold_is_not_given_again_until_it_is_free(rig):
    worker = worker_with(rig, blocks=10)
    beat(rig, worker, OthersLoad(attempts=1, blocks=9, streams=1, running=1))
    rig.submit("r", prompt=12, max_tokens=4)
    assert starts(rig, worker) == []
    beat(rig, worker, OthersLoad(attempts=1, blocks=5, streams=1, running=1))
    assert starts(rig, worker) == ["r"]


def test_worker_that_only_others_use_is_not_idle(rig):
    worker = worker_with(rig, blocks=4)
    beat(rig, worker, OthersLoad(attempts=1, blocks=1, streams=1))
    rig.submit("r", prompt=15, max_tokens=4)
    assert starts(rig, worker) == [], "an idle worker takes whatever fits its context, and this one is not idle"
    beat(rig, worker, None)
    assert starts(rig, worker) == ["r"]


def test_places_that_others_have_taken_count(rig):
    worker = worker_with(rig, max_requests=2)
    beat(rig, worker, OthersLoad(attempts=2, blocks=2, streams=2))
    rig.submit("r")
    assert starts(rig, worker) == []
    beat(rig, worker, OthersLoad(attempts=1, blocks=1, streams=1))
    assert starts(rig, worker) == ["r"]


def test_least_loaded_looks_at_what_others_cause(make_rig):
    rig = make_rig(policy="least-loaded")
    busy, free = rig.key("a-busy"), rig.key("b-free")
    for worker in (busy, free):
        rig.hello(worker)
        rig.beat(worker)
    beat(rig, busy, OthersLoad(attempts=3, blocks=30, streams=3, running=3, queued_tokens=100))
    rig.submit("r")
    assert starts(rig, free) == ["r"]


def test_prompts_of_others_are_waited_for(rig):
    worker = worker_with(rig)
    record = rig.core._registry.find(worker)
    assert record.prompts.wait_s(0.0) == 0.0
    beat(rig, worker, OthersLoad(attempts=1, queued_tokens=4000))
    assert record.prompts.wait_s(0.0) > 0.0
    beat(rig, worker, None)
    assert record.prompts.wait_s(0.0) == 0.0


def test_worker_that_refuses_for_want_of_a_place_opens_no_breaker_and_the_request_goes_on(make_rig):
    rig = make_rig(breaker_failures=1)
    full, free = rig.key("a-full"), rig.key("b-free")
    for worker in (full, free):
        rig.hello(worker)
        rig.beat(worker)
    rig.submit("r")
    [first] = [worker for worker in (full, free) if starts(rig, worker)]
    rig.say(first, AttemptFailed("r", 1, "overloaded", "this worker holds 1024 requests, its bound", True))
    rig.clock.advance(1.0)
    rig.do(rig.core.tick())
    [second] = [worker for worker in (full, free) if worker != first]
    assert starts(rig, second) == ["r"]
    assert rig.core.counters.breakers_opened == 0
