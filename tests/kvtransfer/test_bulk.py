"""What every transport must do, whatever moves its bytes: one suite, between real processes.

A process holds one UCX, so NIXL and ucxx never meet in the process of the tests.
"""

from __future__ import annotations

import base64
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.testing.bulk_process import BulkError, BulkProcess
from penstock.tests.kvtransfer.bulk_ends import (
    GPU_KINDS,
    KINDS,
    NBYTES,
    SOURCE_SEED,
    TARGET_SEED,
    Kind,
    Worker,
    connect,
    draw_spans,
    lacks_gpus,
    linked,
    make_certificates,
    open_worker,
    place,
    require,
)

SOON_S = 1.0
WHOLE = [(0, NBYTES)]
SMALL = [(8192, 24576)]


@dataclass
class Bench:
    """Two workers in two processes, and more when a test needs one to lose."""

    kind: Kind
    folder: Path
    source: Worker
    destination: Worker

    def refill(self) -> None:
        self.source.fill(SOURCE_SEED)
        self.destination.fill(TARGET_SEED)

    def victim(self) -> Worker:
        process = BulkProcess(self.folder, self.kind.settings)
        return open_worker(self.kind, process, "v", SOURCE_SEED)


@pytest.fixture(
    scope="module",
    params=[*KINDS, *(pytest.param(kind, marks=pytest.mark.gpu) for kind in GPU_KINDS if not lacks_gpus(kind))],
    ids=str,
)
def running(request: pytest.FixtureRequest) -> Iterator[Bench]:
    kind: Kind = request.param
    require(kind)
    folder = Path(tempfile.mkdtemp(prefix="bulk-"))
    if kind.transport == "tls":
        make_certificates(folder, "s", "d", "v", "x", "y")
    processes = [BulkProcess(folder, kind.settings) for _ in range(2)]
    source = open_worker(kind, processes[0], "s", SOURCE_SEED)
    destination = open_worker(kind, processes[1], "d", TARGET_SEED)
    yield Bench(kind, folder, source, destination)
    for process in processes:
        process.close()
    shutil.rmtree(folder)


@pytest.fixture
def bench(running: Bench) -> Bench:
    """Both memories as they were in the beginning."""
    running.refill()
    return running


@pytest.fixture
def victim(bench: Bench) -> Iterator[Worker]:
    worker = bench.victim()
    yield worker
    worker.process.thaw()
    worker.process.kill()


def test_bytes_arrive_where_they_belong_and_nothing_else_changes(bench: Bench) -> None:
    """Many pushes of one link, sent before the first is taken: they stay in order."""
    rng = random.Random(7)
    sizes = [1, 24576, 300_000, 5 << 20, 4 << 20, NBYTES // 2, *(rng.randint(1, 2 << 20) for _ in range(6))]
    with linked(bench.source, bench.destination) as pair:
        jobs = [pair.move(draw_spans(rng, size), draw_spans(rng, size)) for size in sizes]
        for job in jobs:
            pair.finish(job)
    assert bench.destination.is_as_expected
    assert bench.source.is_as_expected


def test_both_directions_of_a_link_move_at_the_same_time(bench: Bench) -> None:
    """Two workers with both roles; each half of the memories belongs to one direction."""
    half = NBYTES // 2
    there, back = [(0, half)], [(half, half)]
    one, other = bench.source, bench.destination
    with linked(one, other) as pair:
        jobs = [
            (one, pair.start(one, "send", there)),
            (other, pair.start(other, "send", back)),
            (one, pair.start(one, "receive", back)),
            (other, pair.start(other, "receive", there)),
        ]
        for worker, job in jobs:
            worker.process.wait(job)
    both = bytes(one.expected[:half]) + bytes(other.expected[half:])
    assert one.holds(both)
    assert other.holds(both)


@pytest.mark.parametrize("wanted", [0, 1])
def test_push_no_longer_wanted_is_not_written_further_and_the_next_one_arrives(bench: Bench, wanted: int) -> None:
    before = bytearray(bench.destination.expected)
    with linked(bench.source, bench.destination) as pair:
        jobs = pair.send(WHOLE), pair.receive(WHOLE, WHOLE, wanted)
        pair.finish(jobs)
        written = [
            size
            for size in range(0, (5 << 20), 1 << 20)
            if bench.destination.holds(bench.source.expected[:size] + before[size:])
        ]
        assert len(written) == 1
        assert (written[0] > 0) is (wanted > 0)
        bench.destination.expected[: written[0]] = bench.source.expected[: written[0]]
        pair.finish(pair.move(SMALL, [(NBYTES - 24576, 24576)]))
    assert bench.destination.is_as_expected


def test_discarded_push_keeps_the_next_ones_in_step(bench: Bench) -> None:
    rng = random.Random(3)
    with linked(bench.source, bench.destination) as pair:
        for size in (100, 6 << 20):
            spans = draw_spans(rng, size)
            sent = pair.send(spans)
            pair.finish((sent, pair.start(bench.destination, "discard", spans)))
            pair.finish(pair.move(draw_spans(rng, 70_000), draw_spans(rng, 70_000)))
    assert bench.destination.is_as_expected


def test_stop_ends_what_is_blocked_and_everything_later_fails(bench: Bench) -> None:
    with linked(bench.source, bench.destination) as pair:
        blocked = pair.receive(WHOLE) if bench.kind.waits else None
        assert pair.stop(bench.destination) <= SOON_S
        if blocked is not None:
            with pytest.raises(BulkError):
                bench.destination.process.wait(blocked)
        pair.stop(bench.destination)
        later = pair.receive(WHOLE)
        with pytest.raises(BulkError):
            bench.destination.process.wait(later)
    with linked(bench.source, bench.destination) as pair:
        pair.finish(pair.move(WHOLE, WHOLE))
    assert bench.destination.is_as_expected


@pytest.mark.parametrize("moment", ["before", "while"])
@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_lost_source_holds_nobody_up_and_writes_nothing_late(
    bench: Bench, victim: Worker, fault: str, moment: str
) -> None:
    """It is lost before or while it sends."""
    destination = bench.destination
    with linked(victim, destination) as pair:
        pair.finish(pair.move(SMALL, SMALL))
        if moment == "while":
            pair.send(WHOLE)
            blocked = pair.receive(WHOLE)
        getattr(victim.process, fault)()
        if moment == "before":
            blocked = pair.receive(WHOLE)
        assert pair.stop(destination) <= SOON_S
        _ends_somehow(destination, blocked)
        pair.close(destination)
        destination.fill(TARGET_SEED)
        if fault == "freeze":
            # It goes on, and sends what the destination has long given up.
            victim.process.thaw()
            _ends_somehow(victim, pair.send(WHOLE), may_hang=True)
    assert destination.is_as_expected
    _still_works(bench)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_lost_destination_holds_nobody_up(bench: Bench, victim: Worker, fault: str) -> None:
    source = bench.source
    with linked(source, victim) as pair:
        pair.finish(pair.move(SMALL, SMALL))
        getattr(victim.process, fault)()
        blocked = pair.send(WHOLE)
        assert pair.stop(source) <= SOON_S
        _ends_somehow(source, blocked)
        pair.close(source)
        victim.process.thaw()
    _still_works(bench)


def test_three_sources_lost_one_after_the_other_leave_the_destination_whole(bench: Bench) -> None:
    for _ in range(3):
        victim = bench.victim()
        try:
            with linked(victim, bench.destination) as pair:
                pair.finish(pair.move(SMALL, SMALL))
                victim.process.kill()
        finally:
            victim.process.kill()
    _still_works(bench)


def test_connecting_and_closing_leaves_nothing_behind(bench: Bench) -> None:
    workers = (bench.source, bench.destination)

    def rounds(number: int) -> list[dict[str, int]]:
        for _ in range(number):
            with linked(*workers) as pair:
                pair.finish(pair.move(SMALL, SMALL))
        return [worker.process.ask("counts") for worker in workers]

    before, after = rounds(5), rounds(20)
    for first, last in zip(before, after, strict=True):
        assert last["fds"] <= first["fds"]
        assert last["threads"] <= first["threads"]
        assert last["tasks"] <= first["tasks"]
        assert last["maps"] <= first["maps"] + 10  # the allocator's; a link that leaks would add 20


def test_idle_link_costs_no_core(bench: Bench) -> None:
    """Waiting for bytes that do not come costs as little."""
    with linked(bench.source, bench.destination) as pair:
        pair.finish(pair.move(SMALL, SMALL))
        waiting = pair.receive(WHOLE) if bench.kind.waits else None
        for worker in (bench.source, bench.destination):
            worker.process.ask("idle", seconds=0.5)  # what was busy calms down
            worker.process.tell("idle", seconds=1.0)
        spent = [worker.process.answer() for worker in (bench.source, bench.destination)]
        assert max(spent) < 0.1
        pair.stop(bench.destination)
        if waiting is not None:
            _ends_somehow(bench.destination, waiting)


def test_two_workers_of_one_process_are_linked_like_others(bench: Bench) -> None:
    process = bench.source.process
    source = open_worker(bench.kind, process, "x", SOURCE_SEED)
    destination = open_worker(bench.kind, process, "y", TARGET_SEED)
    with linked(source, destination) as pair:
        pair.finish(pair.move(WHOLE, WHOLE))
        assert destination.is_as_expected
    process.ask("shut", end="x")
    process.ask("shut", end="y")


def test_offer_that_is_none_is_refused_and_others_still_connect(bench: Bench) -> None:
    if bench.kind.transport in ("shm", "tcp", "tls"):
        pytest.skip("the handshake makes these links; they have no offer")
    rng, worker = random.Random(4), bench.destination
    for offer in ("", "AAAA", "gA==", *(base64.b64encode(rng.randbytes(30)).decode() for _ in range(5))):
        job = connect(worker, bench.source, "bad", "00" * 16, True, offer=offer, timeout_s=0.3)
        with pytest.raises(BulkError, match=r"TransferFailed|Unusable"):
            worker.process.wait(job)
    _still_works(bench)


def test_peer_that_does_not_connect_is_given_up_in_time(bench: Bench) -> None:
    """With NIXL it needs to do nothing, so that link is made."""
    worker = bench.source
    job = connect(worker, bench.destination, "alone", "ab" * 16, False, timeout_s=0.5)
    if bench.kind.transport == "nixl":
        worker.process.wait(job)
        worker.process.ask("close", link="alone")
    else:
        with pytest.raises(BulkError, match=r"TransferFailed|Unusable|TimeoutError"):
            worker.process.wait(job)
    _still_works(bench)


def _ends_somehow(worker: Worker, job: str, may_hang: bool = False) -> None:
    """Well or with an error that says why, but soon."""
    error = ""
    try:
        worker.process.ask("wait", job=job, timeout_s=0.5 if may_hang else 5.0)
    except BulkError as err:
        error = str(err)
    assert may_hang or "TimeoutError" not in error


def _still_works(bench: Bench) -> None:
    bench.refill()
    with linked(bench.source, bench.destination) as pair:
        pair.finish(pair.move(WHOLE, WHOLE))
    assert bench.destination.is_as_expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GPU_KINDS, ids=str)
def test_transport_between_gpus_has_gone_through_the_suite(kind: Kind) -> None:
    """Says once for each that everything above did not run for it."""
    if obstacle := lacks_gpus(kind):
        pytest.skip(obstacle)


def test_the_account_of_the_tests_itself_finds_a_byte_too_much() -> None:
    memory = bytearray(8)
    place(memory, [(6, 1), (1, 2)], b"abc")
    assert memory == b"\0bc\0\0\0a\0"
