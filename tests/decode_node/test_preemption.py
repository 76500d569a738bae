"""Preempted sequences are parked or computed again, go on with the right KV, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock.core.ids import AttemptKey, BlockId, WorkerKey
from penstock.decode_node.preemption import Preemption
from penstock.decode_node.role import DecodeRole
from penstock.decode_node.scheduler import DecodeScheduler
from penstock.engine.block_pool import BlockPool
from penstock.engine.interface import OnLayers, ScheduledSeq
from penstock.engine.parking import Parking
from penstock.engine.sequence import Sequence
from penstock.kvtransfer.destination import DestinationTable
from penstock.protocol.messages import (
    Abort,
    ChoiceState,
    Drain,
    FromRouter,
    Output,
    Phases,
    ResetPrefixCache,
    SampledToken,
    StartDecode,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.testing.sim_parking import SteppingClock
from penstock.worker.core import WorkerCore
from penstock.worker.role import Budget, Tell

SIZE = 4
ROUTER = "1" * 16
LONG = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


class Bench:
    """One decode worker with a fake engine: what the router sends in, what it hears."""

    def __init__(self, num_blocks: int, *, park_blocks: int, copy_s: float = 0.0, router: str = ROUTER) -> None:
        self.engine = FakeEngine(num_blocks, SIZE)
        self.pool = BlockPool(num_blocks, SIZE)
        self.clock = FakeClock(0.0)
        capacity = park_blocks * self.engine.memory.block_bytes
        self.parking = Parking(self.engine.memory, capacity, SteppingClock(copy_s))
        me = WorkerKey("decode-0", "d" * 16)
        destination = DestinationTable(5.0)
        self.role = DecodeRole(me, self.engine.spec, self.pool, destination, b"", parking=self.parking)
        self.core = WorkerCore(me, "decode", self.engine, self.pool, [self.role], self.clock, max_batch_tokens=64)
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self._number, self._router = 0, router

    def say(self, body: ToWorker, router: str | None = None) -> None:
        self._number += 1
        self._hear(self.core.on_frame(FromRouter(router or self._router, self._number, body)))
        self.check()

    def start(self, name: str, prompt_ids: list[int], params: SamplingParams = LONG, timeout_s: float = 1e6) -> None:
        self.tokens[name] = []
        self.say(StartDecode(name, 1, pack_ids(prompt_ids), params, [ChoiceState(0)], timeout_s))

    def step(self) -> int:
        """How many sequences ran. A step takes 10 ms."""
        batch, effects = self.core.begin_step()
        self._hear(effects)
        self.check()
        self.clock.advance(0.01)
        self._hear(self.core.end_step(batch, self.core.compute(batch)))
        self.check()
        return len(batch)

    def run(self, until: Callable[[], bool], limit: int = 300) -> None:
        for _ in range(limit):
            if until():
                return
            self.step()
        raise AssertionError("it does not come to that")

    def check(self) -> None:
        self.core.check_invariants()
        self.role.check_invariants()

    @property
    def load(self) -> Any:
        return self.core.snapshot().load

    @property
    def is_parked(self) -> bool:
        return bool(self.parking.parked_bytes)

    def assert_empty(self) -> None:
        assert self.parking.parked_bytes == 0
        assert self.pool.num_free_blocks == self.pool.num_blocks

    def _hear(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Tell) and isinstance(effect.message, Output):
                for item in effect.message.items:
                    self.tokens[item.request_id] += [token.token_id for token in item.tokens]
                    if item.finish_reason is not None:
                        self.finished[item.request_id] = item.finish_reason


def prompt(number: int, num_tokens: int = 9) -> list[int]:
    return [100 * number + i for i in range(num_tokens)]


def crowd(bench: Bench, count: int = 3) -> dict[str, list[int]]:
    """More sequences than the pool can hold to their ends."""
    prompts = {f"r{number}": prompt(number) for number in range(1, count + 1)}
    for name, prompt_ids in prompts.items():
        bench.start(name, prompt_ids)
        bench.clock.advance(0.001)
    return prompts


@pytest.mark.parametrize("park_blocks", [0, 1, 4, 100])
def test_preempted_sequences_give_the_same_tokens_however_they_come_back(park_blocks: int) -> None:
    bench = Bench(12, park_blocks=park_blocks)
    prompts = crowd(bench)
    bench.run(lambda: len(bench.finished) == len(prompts))
    for name, prompt_ids in prompts.items():
        assert (bench.tokens[name], bench.finished[name]) == expected_tokens(prompt_ids, LONG)
    assert bench.load.preemptions > 0
    assert (bench.load.parked > 0) == (park_blocks >= 4)
    assert bench.load.parked == bench.load.unparked
    bench.assert_empty()


def test_unparked_sequence_computes_nothing_again() -> None:
    def computed_tokens(park_blocks: int) -> int:
        bench = Bench(12, park_blocks=park_blocks)
        prompts = crowd(bench)
        total = 0
        execute = bench.engine.execute

        def count(batch: list[ScheduledSeq], on_layers: OnLayers | None = None) -> list[tuple[SampledToken, ...]]:
            nonlocal total
            total += sum(entry.num_new_tokens for entry in batch)
            return execute(batch, on_layers)

        bench.engine.execute = count  # type: ignore[method-assign]
        bench.run(lambda: len(bench.finished) == len(prompts))
        assert bench.load.preemptions > 0
        return total

    once = sum(len(prompt(n)) + LONG.max_tokens - 1 for n in range(1, 4))
    assert computed_tokens(100) == once
    assert computed_tokens(0) > once


def test_unparked_sequence_takes_cached_blocks_first_and_copies_the_rest() -> None:
    bench = Bench(12, park_blocks=100)
    crowd(bench)
    bench.run(lambda: bench.is_parked)
    [waiting] = [seq for seq in bench.role._scheduler.waiting if seq.num_parked_tokens]
    num_parked = -(-waiting.num_parked_tokens // SIZE)
    cached = len(bench.pool.match_prefix(waiting.hashes(SIZE)))
    bench.parking.take_copied()
    for name in ("r1", "r2", "r3"):
        if name != waiting.key.request_id:
            bench.say(Abort(name, 1))
    held_now = len(bench.pool.match_prefix(waiting.hashes(SIZE)[: (waiting.num_tokens - 1) // SIZE]))
    assert held_now == cached > 0, "the test needs some blocks that are still cached"
    bench.core.begin_step()
    assert bench.parking.take_copied().nbytes == (num_parked - held_now) * bench.parking.block_bytes
    assert waiting.num_cached_tokens == held_now * SIZE
    assert waiting.num_computed_tokens == waiting.num_tokens - 1


def test_corrupt_parked_copy_is_computed_again() -> None:
    bench = Bench(12, park_blocks=100)
    prompts = crowd(bench)
    bench.run(lambda: bench.is_parked)
    [waiting] = [seq for seq in bench.role._scheduler.waiting if seq.num_parked_tokens]
    bench.say(ResetPrefixCache())
    for view in bench.parking.views(next(iter(bench.parking._parked)))[1:]:
        view[0] ^= 4
    assert waiting.num_parked_tokens > SIZE
    bench.run(lambda: len(bench.finished) == len(prompts))
    assert bench.load.corrupt_parked_blocks > 0
    for name, prompt_ids in prompts.items():
        assert bench.tokens[name] == expected_tokens(prompt_ids, LONG)[0]


@pytest.mark.parametrize("end", ["abort", "deadline", "router", "choice"])
def test_parked_sequence_that_ends_gives_its_host_memory_back_once(end: str) -> None:
    bench = Bench(12, park_blocks=100)
    for number in (1, 2, 3):
        bench.start(f"r{number}", prompt(number), timeout_s=50.0 if number == 3 else 1e6)
        bench.clock.advance(0.001)
    bench.run(lambda: bench.is_parked)
    [name] = [seq.key.request_id for seq in bench.role._scheduler.waiting if seq.num_parked_tokens]
    assert name == "r3"
    if end == "abort":
        bench.say(Abort(name, 1))
        bench.say(Abort(name, 1))
    elif end == "choice":
        bench.say(Abort(name, 1, choice=0))
    elif end == "deadline":
        bench.clock.advance(60.0)
        bench.core.tick()
    else:
        bench.say(Drain(), router="2" * 16)
        bench.assert_empty()
    bench.check()
    assert bench.parking.parked_bytes == 0
    assert name not in [key.request_id for key in bench.role.active()]


def test_preempted_sequences_wait_in_the_order_of_their_arrival() -> None:
    bench = Bench(14, park_blocks=100)
    crowd(bench, 4)
    bench.run(lambda: bench.load.preemptions >= 2)
    waiting = [seq.key.request_id for seq in bench.role._scheduler.waiting]
    assert waiting == sorted(waiting)
    bench.start("r9", prompt(9))
    assert [seq.key.request_id for seq in bench.role._scheduler.waiting][-1] == "r9"
    bench.run(lambda: len(bench.finished) == 5)


def test_parked_tokens_are_no_queued_work() -> None:
    bench = Bench(12, park_blocks=100)
    crowd(bench)
    bench.run(lambda: bench.is_parked)
    [waiting] = bench.role._scheduler.waiting
    assert bench.load.waiting == 1
    assert bench.load.queued_tokens == waiting.num_tokens - waiting.num_parked_tokens == 1
    assert bench.load.parked_bytes == -(-waiting.num_parked_tokens // SIZE) * bench.engine.memory.block_bytes


def test_copies_measured_as_dear_make_it_compute_again() -> None:
    """The first preemption measures copying at 10 s a sequence; from then on a prefill of 10 ms is cheaper."""
    bench = Bench(12, park_blocks=100, copy_s=10.0)
    prompts = crowd(bench, 5)
    bench.run(lambda: len(bench.finished) == len(prompts))
    assert bench.load.preemptions > bench.load.parked > 0
    for name, prompt_ids in prompts.items():
        assert bench.tokens[name] == expected_tokens(prompt_ids, LONG)[0]
    bench.assert_empty()


# ---- the pieces ----


def sequence(num_tokens: int, name: str = "a", arrival: float = 0.0) -> Sequence:
    return Sequence(AttemptKey(name, 1), 0, list(range(1, num_tokens + 1)), LONG, b"k" * 32, arrival, 1e9)


def running(pool: BlockPool, seq: Sequence, num_computed: int) -> Sequence:
    seq.block_table = pool.allocate(-(-seq.num_tokens // SIZE))
    seq.num_computed_tokens = num_computed
    return seq


def preemption_of(pool: BlockPool, engine: FakeEngine, park_blocks: int = 100) -> tuple[Preemption, Parking]:
    parking = Parking(engine.memory, park_blocks * engine.memory.block_bytes, FakeClock())
    return Preemption(pool, parking), parking


@pytest.mark.parametrize(("num_computed", "num_parked_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3)])
def test_leave_parks_the_computed_blocks_alone(num_computed: int, num_parked_blocks: int) -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, parking = preemption_of(pool, engine)
    seq = running(pool, sequence(10), num_computed)
    preemption.leave(seq, 0.0)
    assert seq.block_table == []
    assert (seq.num_parked_tokens, seq.num_computed_tokens) == (num_computed, 0)
    assert parking.parked_bytes == num_parked_blocks * parking.block_bytes
    assert pool.num_free_blocks == 8


def test_leave_copies_before_it_frees() -> None:
    """The blocks still have an owner when they are read."""
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, parking = preemption_of(pool, engine)
    seq = running(pool, sequence(8), 7)
    seen: list[int] = []
    park = parking.park

    def watch(name: Any, block_ids: list[BlockId]) -> bool:
        seen.extend(pool.ref_count(block_id) for block_id in block_ids)
        return park(name, block_ids)

    parking.park = watch  # type: ignore[method-assign, assignment]
    preemption.leave(seq, 0.0)
    assert seen == [1, 1]


def test_leave_does_not_park_what_others_keep_anyway() -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, parking = preemption_of(pool, engine)
    seq = running(pool, sequence(9), 8)
    pool.acquire(seq.block_table[:2])
    preemption.leave(seq, 0.0)
    assert parking.parked_bytes == 0
    seq = running(pool, sequence(9), 8)
    pool.acquire(seq.block_table[:1])
    preemption.leave(seq, 0.0)
    assert parking.parked_bytes == 2 * parking.block_bytes


def test_come_back_with_more_cached_than_parked_copies_nothing() -> None:
    """Another sequence with the same tokens has computed on meanwhile."""
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, parking = preemption_of(pool, engine)
    seq = running(pool, sequence(14), 5)
    preemption.leave(seq, 0.0)
    parking.take_copied()
    running(pool, seq, 12)
    seq.num_published_blocks = 3
    preemption.come_back(seq)
    assert (seq.num_computed_tokens, seq.num_parked_tokens) == (12, 0)
    assert parking.take_copied().nbytes == 0
    assert parking.parked_bytes == 0


def test_come_back_publishes_what_it_has_restored() -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, _ = preemption_of(pool, engine)
    seq = running(pool, sequence(10), 9)
    preemption.leave(seq, 0.0)
    running(pool, seq, 0)
    preemption.come_back(seq)
    assert seq.num_computed_tokens == 9
    assert pool.match_prefix(seq.hashes(SIZE)) == seq.block_table[:2]


@pytest.mark.parametrize(("sizes", "rate"), [([1, 1, 1], None), ([5, 1, 1], 70.0), ([2, 1, 1], None), ([8], 80.0)])
def test_only_steps_that_mostly_prefill_measure_prefill(sizes: list[int], rate: float | None) -> None:
    preemption, _ = preemption_of(BlockPool(8, SIZE), FakeEngine(8, SIZE))
    preemption.note_step([ScheduledSeq(sequence(20), size) for size in sizes], 0.1, 0.0)
    assert preemption.cost.prefill.per_s(0.0) == (None if rate is None else pytest.approx(rate))


def test_time_spent_on_copies_is_no_prefill_time() -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption = Preemption(pool, Parking(engine.memory, 1 << 20, SteppingClock(0.25)))
    preemption.leave(running(pool, sequence(8), 7), 0.0)
    preemption.note_step([ScheduledSeq(sequence(20), 10)], 0.75, 0.0)
    assert preemption.cost.prefill.per_s(0.0) == pytest.approx(10 / 0.5)
    assert preemption.cost.copying.per_s(0.0) == pytest.approx(2 * engine.memory.block_bytes / 0.25)


def test_handoff_reports_the_rate_of_prefill_workers() -> None:
    preemption, _ = preemption_of(BlockPool(8, SIZE), FakeEngine(8, SIZE))
    preemption.note_handoff(120, Phases(prefill_s=0.5, cached_tokens=20), 0.0)
    assert preemption.cost.prefill_elsewhere.per_s(0.0) == 200.0


def test_check_invariants_notices_a_parked_sequence_that_runs() -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, _ = preemption_of(pool, engine)
    scheduler = DecodeScheduler(pool, 4, preemption)
    seq = sequence(8)
    scheduler.add_waiting([seq])
    scheduler.schedule(Budget(64, 64), 0.0)
    scheduler.check_invariants()
    seq.num_parked_tokens = 4
    with pytest.raises(AssertionError, match="run and are parked"):
        scheduler.check_invariants()


def test_check_invariants_notices_host_memory_without_a_sequence() -> None:
    pool, engine = BlockPool(8, SIZE), FakeEngine(8, SIZE)
    preemption, _ = preemption_of(pool, engine)
    scheduler = DecodeScheduler(pool, 4, preemption)
    preemption.leave(running(pool, sequence(8), 7), 0.0)
    with pytest.raises(AssertionError, match="parked are"):
        scheduler.check_invariants()


def test_preempted_sequence_stands_behind_an_older_one_that_waits() -> None:
    """It was received while the older one already waited."""
    pool = BlockPool(2, SIZE)
    scheduler = DecodeScheduler(pool, 4)
    old, received = sequence(8, "old", 1.0), sequence(9, "received", 2.0)
    scheduler.add_waiting([old])
    received.block_table, received.num_computed_tokens = pool.allocate(2), 8
    scheduler.join(received)
    scheduler.schedule(Budget(64, 64), 0.0)
    assert scheduler.num_preemptions == 1
    assert [*scheduler.running, *scheduler.waiting] == [old, received]


def test_check_invariants_notices_waiting_out_of_order() -> None:
    scheduler = DecodeScheduler(BlockPool(8, SIZE), 4)
    scheduler.add_waiting([sequence(4, "late", 2.0), sequence(4, "early", 1.0)])
    with pytest.raises(AssertionError, match="order"):
        scheduler.check_invariants()
