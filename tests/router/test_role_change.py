"""Roles that change by order, and what the router says of the attempt that gave the first token."""

from __future__ import annotations

import pytest

from penstock.core.errors import BadRequest
from penstock.protocol.messages import (
    Heartbeat,
    Output,
    Peers,
    Phases,
    SampledToken,
    SetRole,
    StepTime,
    Tokens,
    WorkerLoad,
)


def beat_as(rig, worker, role):
    """A heartbeat that covers every command and names this role."""
    received = rig.sent[worker][-1].message.number
    linked = [(peer.worker_id, peer.epoch, "shm") for peer in rig.links.get(worker, [])]
    active = rig.live_on(worker)
    rig.say(worker, Heartbeat(received, "ready", WorkerLoad(100, 100), active, linked, role=role))


def roles(rig):
    return {row.worker_id: row.role for row in rig.core.status().workers}


def test_worker_has_its_new_role_once_its_heartbeat_says_so(rig):
    prefill, decode = rig.join("p0", "prefill"), rig.join("d0", "decode")
    rig.do(rig.core.set_role("p0", "both"))
    assert rig.sent[prefill][-1].message.body == SetRole("both")
    assert roles(rig)["p0"] == "prefill"
    beat_as(rig, prefill, "prefill")
    assert roles(rig)["p0"] == "prefill"
    beat_as(rig, prefill, "both")
    assert roles(rig)["p0"] == "both"
    introduced = [send.message.body for send in rig.sent[decode] if isinstance(send.message.body, Peers)][-1]
    assert [(peer.worker_id, peer.role) for peer in introduced.peers] == [("p0", "both")]


def test_running_requests_stay_and_new_ones_go_by_the_new_role(rig):
    first, second = rig.join("d0", "decode"), rig.join("d1", "decode")
    rig.submit("old")
    held, _ = rig.start("old")
    other = second if held == first else first
    rig.out(1, request_id="old")
    rig.do(rig.core.set_role(held.worker_id, "prefill"))
    beat_as(rig, held, "prefill")
    for number in range(4):
        rig.submit(f"new{number}")
        assert rig.start(f"new{number}")[0] == other
    assert rig.start("old")[1].attempt == 1
    assert rig.aborts(held) == []
    rig.out(3, request_id="old", end="length")
    assert rig.ends["old"].error is None


@pytest.mark.parametrize(
    ("worker", "role", "message"),
    [
        ("d0", "prefill", "d0 is the only worker that decodes"),
        ("x" * 100, "decode", "there are: d0, p0"),
        ("gone", "decode", "is not there"),
    ],
)
def test_order_that_cannot_be_is_refused(rig, worker, role, message):
    rig.join("p0", "prefill")
    rig.join("d0", "decode")
    gone = rig.join("gone", "decode")
    rig.goodbye(gone)
    with pytest.raises(BadRequest, match=message):
        rig.core.set_role(worker, role)


def test_fixed_roles_are_refused_with_the_reason(make_rig):
    rig = make_rig(fixed_roles="they share one pool")
    rig.join("d0", "decode")
    with pytest.raises(BadRequest, match="they share one pool"):
        rig.core.set_role("d0", "both")


def test_routing_tells_queue_retry_and_attempt_and_comes_once(rig):
    rig.submit()
    rig.wait(0.5)
    worker = rig.join("d0", "both")  # only now there is one
    rig.wait(0.25)
    rig.failed(retriable=True)
    rig.beat(worker)
    rig.wait(0.125)
    start = rig.start()[1]
    assert start.attempt == 2
    for index, phases in ((0, Phases(prefill_s=0.1)), (1, None)):
        token = (SampledToken(rig.token_at(0, index)),)
        item = Tokens("r", 2, 0, index, token, phases=phases, wait_s=0.25 * index)
        rig.say(worker, Output([item], StepTime(0.5, 0.125) if index else None))
    first, second = rig.events["r"]
    assert (first.routing.queue_s, first.routing.retry_s, first.routing.attempt_s) == (0.5, 0.25, 0.125)
    assert (first.routing.decode, first.routing.prefill) == ("d0", None)
    assert (first.step, first.wait_s) == (None, 0.0)
    assert second.routing is None
    assert (second.step, second.wait_s) == (StepTime(0.5, 0.125), 0.25)
