"""Role balance within the router: it looks at timers only, orders, records, and leaves alone what it must."""

from __future__ import annotations

import pytest

from penstock.protocol.messages import Heartbeat, Output, Phases, SampledToken, SetRole, Tokens, WorkerLoad

NUM_REQUESTS = 40


def beat_as(rig, worker, role):
    received = rig.sent[worker][-1].message.number
    linked = [(peer.worker_id, peer.epoch, "shm") for peer in rig.links.get(worker, [])]
    rig.say(worker, Heartbeat(received, "ready", WorkerLoad(100, 100), rig.live_on(worker), linked, role=role))


def orders(rig):
    """Roles that workers were asked to take, in order."""
    found = [
        (send.message.number, worker.worker_id, send.message.body.role)
        for worker, sends in rig.sent.items()
        for send in sends
        if isinstance(send.message.body, SetRole)
    ]
    return [(name, role) for _, name, role in found]


def prompts_that_take(rig, seconds):
    """So many answers of one token whose prompts took so long."""
    for number in range(NUM_REQUESTS):
        name = f"r{rig.clock.now()}-{number}"
        rig.submit(name, max_tokens=1)
        worker, start = rig.start(name)
        token = (SampledToken(rig.token_at(0, 0)),)
        phases = Phases(prefill_s=seconds, transfer_s=0.001)
        rig.say(worker, Output([Tokens(name, start.attempt, 0, 0, token, "length", phases=phases)]))
        rig.clock.advance(0.05)


def crowd(make_rig, **settings):
    rig = make_rig(balance_roles=True, worker_timeout_s=1000.0, **settings)
    workers = [rig.join("p0", "prefill"), *(rig.join(f"d{i}", "decode") for i in range(3))]
    return rig, workers


def test_starved_leg_gets_a_worker_and_the_reason_is_told(make_rig):
    rig, _ = crowd(make_rig)
    prompts_that_take(rig, 0.2)  # 20 a second: four workers' worth
    assert orders(rig) == [], "nothing happens between two looks"
    rig.wait(1.0)
    assert orders(rig) == [("d0", "prefill")]
    status = rig.core.status()
    assert status.balances_roles
    assert status.role_change_counts == [("decode", "prefill", "planner", 1)]
    (change,) = status.role_changes
    assert (change.worker_id, change.before, change.after, change.by) == ("d0", "decode", "prefill", "planner")
    assert change.reason.startswith("1P+3D at prefill")
    rig.wait(2.0)
    assert rig.core.status().role_changes[0].age_s == pytest.approx(2.0)


def test_worker_on_its_way_counts_as_what_it_will_be(make_rig):
    rig, workers = crowd(make_rig)
    prompts_that_take(rig, 0.2)
    rig.wait(1.0)
    for _ in range(3):
        prompts_that_take(rig, 0.2)
        rig.wait(1.0)
    assert {name for name, _ in orders(rig)} <= {"d0", "d1", "d2"}
    assert len(orders(rig)) == len(set(orders(rig))), "nobody is asked twice while it turns"
    beat_as(rig, workers[1], "prefill")
    assert {row.worker_id: row.role for row in rig.core.status().workers}["d0"] == "prefill"


@pytest.mark.parametrize("settings", [{"fixed_roles": "one pool"}, {"disaggregate": "never"}])
def test_what_must_not_change_is_left_alone(make_rig, settings):
    rig, _ = crowd(make_rig, **settings)
    prompts_that_take(rig, 0.2)
    rig.wait(1.0)
    assert orders(rig) == []
    assert not rig.core.status().balances_roles


def test_it_is_off_unless_asked_for(make_rig):
    rig = make_rig(worker_timeout_s=1000.0)
    rig.join("p0", "prefill")
    rig.join("d0", "decode")
    rig.join("d1", "decode")
    prompts_that_take(rig, 0.2)
    rig.wait(1.0)
    assert orders(rig) == []


def test_draining_router_changes_nothing(make_rig):
    rig, _ = crowd(make_rig)
    prompts_that_take(rig, 0.2)
    rig.do(rig.core.drain())
    rig.wait(1.0)
    assert orders(rig) == []


def test_changes_that_people_ask_for_are_recorded_too(rig):
    rig.join("d0", "decode")
    rig.join("d1", "decode")
    rig.do(rig.core.set_role("d0", "both"))
    rig.do(rig.core.set_role("d1", "decode"))  # it has it
    assert rig.core.status().role_change_counts == [("decode", "both", "operator", 1)]
