"""Workers that end, fall silent, or hang while their heartbeats go on."""

from __future__ import annotations

import pytest

from penstock.core.ids import WorkerKey
from penstock.protocol.messages import Heartbeat, WorkerLoad


def stall(rig, worker, age_s=61.0):
    """A heartbeat of a worker whose loop stands still: it reports what it held when it last turned."""
    received = max((send.message.number for send in rig.sent[worker]), default=0)
    links = [(peer.worker_id, peer.epoch, "shm") for peer in rig.links.get(worker, [])]
    beat = Heartbeat(received, "stalled", WorkerLoad(100, 90), rig.live_on(worker), links, turn_age_s=age_s)
    return rig.say(worker, beat)


def row_of(rig, worker):
    return next(row for row in rig.core.status().workers if row.worker_id == worker.worker_id)


def test_process_that_ended_is_lost_at_once_and_for_good(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.submit(max_tokens=4)
    rig.out(2)
    holder = rig.start()[0]
    rig.do(rig.core.process_ended(holder, "its process ended"))
    assert rig.start()[0] == ({first, second} - {holder}).pop()
    rig.beat(holder)
    assert row_of(rig, holder).state == "lost"


def test_end_of_an_older_incarnation_leaves_its_successor_alone(rig):
    rig.join("d0", "both")
    rig.join("d0", "both", generation=1)
    rig.do(rig.core.process_ended(WorkerKey("d0", rig.key("d0").epoch), "its process ended"))
    assert row_of(rig, rig.key("d0")).state == "ready"


def test_hung_decode_worker_loses_its_streams_to_another_behind_their_tokens(rig):
    first, second = rig.join("d0", "both"), rig.join("d1", "both")
    rig.submit(max_tokens=4)
    rig.out(2)
    holder, _ = rig.start()
    stall(rig, holder)
    other, start = rig.start()
    assert other == ({first, second} - {holder}).pop()
    assert len(start.choices[0].output_ids) == 8, "two tokens of four bytes"
    assert [abort.attempt for abort in rig.aborts(holder)] == [1], "it finds the Abort when it turns again"
    rig.out(2, end="length")
    assert (rig.ends["r"].error, rig.ends["r"].resumed) == (None, 1)


def test_hung_worker_gets_nothing_new_and_is_not_ready(rig):
    worker = rig.join("d0", "both")
    stall(rig, worker)
    assert row_of(rig, worker).state == "stalled"
    assert row_of(rig, worker).turn_age_s == 61.0
    assert rig.core.status().why_not_ready == "no decode worker is ready"
    rig.submit()
    with pytest.raises(ValueError, match="empty"):
        rig.start()
    rig.beat(worker)
    assert rig.start()[0] == worker, "it turns again and is taken back"
    assert rig.core.status().ready


def test_hung_worker_is_counted_and_moved_away_from_once(rig):
    worker = rig.join("d0", "both")
    rig.join("d1", "both")
    rig.submit(max_tokens=4)
    for _ in range(5):
        stall(rig, worker)
    assert rig.core.counters.workers_stalled == 1
    assert rig.core.counters.workers_lost == 0
    assert rig.core.counters.orphans_aborted == 0, "what it still reports is not asked about while it hangs"


def test_tokens_of_a_hung_worker_that_turns_again_change_nothing(rig):
    rig.join("d0", "both")
    rig.join("d1", "both")
    rig.submit(max_tokens=4)
    rig.out(1)
    holder, start = rig.start()
    stall(rig, holder)
    rig.out(1)
    rig.beat(holder, active=[])
    stale = rig.core.counters.stale_messages
    rig.out(1, worker=holder, attempt=start.attempt)
    assert rig.core.counters.stale_messages == stale + 1
    rig.out(2, end="length")
    assert rig.ends["r"].error is None


def test_hung_prefill_worker_costs_only_the_prompts_it_has_not_handed_over(rig):
    prefill, decode = rig.pair()
    rig.submit("running", max_tokens=4)
    rig.out(1, request_id="running")
    rig.submit("waiting", max_tokens=4)
    stall(rig, prefill)
    assert rig.start("running")[1].attempt == 1
    assert rig.start("waiting")[1].attempt == 2
    assert rig.start("waiting")[1].ticket is None, "decode prefills itself while no prefill worker turns"
    rig.out(3, request_id="running", end="length")
    rig.finish("waiting", decode)
    assert rig.ends["waiting"].error is None


def test_lost_worker_that_hung_is_taken_back_when_it_turns(rig):
    worker = rig.join("d0", "both")
    stall(rig, worker)
    rig.wait(2)
    assert row_of(rig, worker).state == "lost"
    stall(rig, worker)
    assert row_of(rig, worker).state == "stalled"
    rig.beat(worker)
    assert row_of(rig, worker).state == "ready"


def test_expected_blocks_are_those_of_wanted_attempts(rig):
    prefill, decode = rig.pair()
    rig.submit(prompt=10, max_tokens=4)
    assert (row_of(rig, decode).expected_blocks, row_of(rig, decode).num_attempts) == (3, 1)
    assert (row_of(rig, prefill).expected_blocks, row_of(rig, prefill).num_attempts) == (3, 1)
    rig.prefill_ended()
    assert (row_of(rig, prefill).expected_blocks, row_of(rig, prefill).num_attempts) == (0, 0)
    rig.out(4, end="length")
    assert row_of(rig, decode).expected_blocks == 0


@pytest.mark.parametrize("teller", ["prefill", "decode"])
def test_pair_whose_link_is_said_to_be_lost_gets_no_hand_off_until_it_is_named_again(rig, teller):
    _, decode = rig.pair()
    rig.submit()
    if teller == "decode":
        rig.failed(retriable=True, code="node_lost")
    else:
        rig.prefill_ended(ok=False, code="node_lost")
    assert rig.start()[1].attempt == 2
    assert rig.start()[1].ticket is None, "no second attempt over a link that is not there"
    rig.submit("next")
    assert rig.start("next")[1].ticket is None
    rig.beat(decode)
    rig.submit("later")
    assert rig.start("later")[1].ticket is not None


def test_broken_hand_off_over_a_living_link_is_tried_again_as_one(rig):
    rig.pair()
    rig.submit()
    rig.failed(retriable=True, code="transfer_failed")
    assert rig.start()[1].ticket is not None
