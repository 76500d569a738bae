"""The prefill role alone, with the decode side played by the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import WorkerKey
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.effects import MessageArrived, PeerLost, PeerUp, SendBlocks, SendMessage
from penstock.kvtransfer.source import SourceTable
from penstock.prefill_node.role import PrefillRole
from penstock.protocol.messages import (
    Abort,
    Ack,
    Cancel,
    Done,
    Failed,
    Grant,
    HandoffMessage,
    Offer,
    PrefillEnded,
    StartPrefill,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import WorkerCore
from penstock.worker.role import Tell

PROMPT = list(range(1, 12))  # 11 tokens: two full blocks of 4 and a part
DECODE = WorkerKey("decode-0", "d" * 16)
TICKET = b"t" * 16
M = TypeVar("M")


class Bench:
    """One prefill worker under test; collects what it sends."""

    def __init__(self, num_blocks: int = 16, max_batch_tokens: int = 4) -> None:
        self.engine, self.clock = FakeEngine(num_blocks), FakeClock(0.0)
        self.pool = BlockPool(num_blocks, 4)
        self.role = PrefillRole(self.engine.spec, self.pool, SourceTable(5.0, 5.0))
        self.core = WorkerCore(
            WorkerKey("prefill-0", "0" * 16), "prefill", self.engine, self.pool, [self.role], self.clock,
            max_batch_tokens=max_batch_tokens,
        )  # fmt: skip
        self.sent: list[object] = []
        self.take(self.core.on_link(PeerUp(DECODE, "test")))

    def take(self, effects: Sequence[object]) -> None:
        self.sent += [e.message if isinstance(e, Tell | SendMessage) else e for e in effects]
        self.core.check_invariants()

    def start(self, request_id: str = "r", ticket: bytes = TICKET, **changes: Any) -> None:
        values: dict[str, Any] = {
            "prompt_ids": pack_ids(PROMPT), "params": SamplingParams(max_tokens=4, temperature=0), "timeout_s": 10.0,
            "decode_worker": DECODE.worker_id, "decode_epoch": DECODE.epoch,
        }  # fmt: skip
        self.role.on_command(StartPrefill(request_id, 1, ticket, **(values | changes)), self.clock.now())
        self.take(self.role.take_effects())

    def hear(self, message: HandoffMessage) -> None:
        self.take(self.core.on_link(MessageArrived(DECODE, message)))

    def step(self) -> None:
        batch, effects = self.core.begin_step()
        self.take(effects)
        if batch:
            self.take(self.core.end_step(batch, self.core.compute(batch)))

    def of(self, kind: type[M]) -> list[M]:
        return [m for m in self.sent if isinstance(m, kind)]


def test_prefill_offer_leaves_before_the_first_chunk_and_done_after_the_last() -> None:
    bench = Bench()
    bench.start()
    assert bench.of(Offer) == []
    bench.step()
    assert bench.of(Offer) == [Offer(TICKET, 11, 3)]
    bench.hear(Grant(TICKET, 1, 0))
    for _ in range(2):
        bench.step()
    pushes = bench.of(SendBlocks)
    assert [o for p in pushes for o in p.ordinals] == [0, 1, 2]
    assert len(pushes) > 1, "full blocks leave before the prompt is done"
    [done] = bench.of(Done)
    expected = expected_tokens(PROMPT, SamplingParams(max_tokens=4, temperature=0))[0][0]
    assert (done.num_blocks, done.first_tokens[0].token_id) == (3, expected)
    assert isinstance(bench.sent[-1], Done)


def test_prefill_blocks_stay_until_acknowledged_and_are_findable_after() -> None:
    bench = Bench()
    bench.start()
    for _ in range(3):
        bench.step()
    bench.hear(Grant(TICKET, 1, 0))
    assert bench.pool.num_free_blocks == 13
    bench.hear(Ack(TICKET, 1))
    assert (bench.pool.num_free_blocks, bench.pool.num_cached_blocks) == (16, 2)
    assert bench.of(PrefillEnded) == [PrefillEnded("r", 1, True)]


def test_prefill_same_prompt_again_reuses_its_blocks() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.start()
    bench.step()
    bench.hear(Grant(TICKET, 1, 0))
    bench.hear(Ack(TICKET, 1))
    bench.start("again", b"u" * 16)
    bench.step()
    bench.hear(Grant(b"u" * 16, 2, 0))
    assert bench.of(Done)[-1].phases.cached_tokens == 8


def test_prefill_held_blocks_do_not_travel() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.start()
    bench.step()
    bench.hear(Grant(TICKET, 1, 2))
    [push] = bench.of(SendBlocks)
    assert push.ordinals == (2,)


def test_prefill_n_choices_samples_each_first_token() -> None:
    bench = Bench(max_batch_tokens=64)
    params = SamplingParams(max_tokens=4, n=3, seed=9)
    bench.start(params=params)
    bench.step()
    bench.hear(Grant(TICKET, 1, 0))
    [done] = bench.of(Done)
    expected = [
        expected_tokens(PROMPT, SamplingParams(max_tokens=4, n=3, seed=9, ignore_eos=True), c)[0][0] for c in range(3)
    ]
    assert [t.token_id for t in done.first_tokens] == expected


@pytest.mark.parametrize("moment", ["waiting", "computing", "handing"])
@pytest.mark.parametrize("cause", ["abort", "peer lost", "deadline", "cancel", "router gone"])
def test_prefill_every_way_out_tells_once_and_frees_all(moment: str, cause: str) -> None:
    bench = Bench()
    bench.start()
    for _ in range({"waiting": 0, "computing": 1, "handing": 3}[moment]):
        bench.step()
    match cause:
        case "abort":
            bench.role.on_command(Abort("r", 1), 0.0)
        case "peer lost":
            bench.take(bench.core.on_link(PeerLost(DECODE, "gone")))
        case "deadline":
            bench.clock.advance(11.0)
        case "cancel" if moment == "waiting":
            pytest.skip("decode has heard of nothing yet")
        case "cancel":
            bench.hear(Cancel(TICKET, "cancelled", "not wanted"))
        case "router gone":
            bench.role.abort_all(0.0)
    bench.take(bench.core.tick())
    bench.step()
    [ended] = bench.of(PrefillEnded)
    assert not ended.ok
    assert bench.pool.num_free_blocks == 16
    assert bench.role.active() == []
    if cause in ("abort", "deadline", "router gone") and moment != "waiting":
        assert len(bench.of(Failed)) == 1


def test_prefill_full_pool_makes_the_next_wait_until_blocks_return() -> None:
    bench = Bench(num_blocks=4, max_batch_tokens=64)
    bench.start("a", b"a" * 16)
    bench.start("b", b"b" * 16, prompt_ids=pack_ids(list(range(100, 111))))
    bench.step()
    assert [o.ticket for o in bench.of(Offer)] == [b"a" * 16]
    bench.hear(Grant(b"a" * 16, 1, 0))
    bench.hear(Ack(b"a" * 16, 1))
    bench.step()
    assert [o.ticket for o in bench.of(Offer)] == [b"a" * 16, b"b" * 16]


def test_prefill_engine_failure_ends_only_that_request() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.engine._fails = lambda entry: entry.seq.key.request_id == "bad"
    bench.start("good", b"g" * 16)
    bench.start("bad", b"b" * 16, prompt_ids=pack_ids([50, 51, 52]))
    bench.step()
    bench.hear(Grant(b"g" * 16, 1, 0))
    [ended] = bench.of(PrefillEnded)
    assert (ended.request_id, ended.code) == ("bad", InternalError.code)
    assert [d.ticket for d in bench.of(Done)] == [b"g" * 16]


def test_prefill_without_a_link_fails_at_once() -> None:
    bench = Bench()
    bench.start(decode_epoch="e" * 16)
    [ended] = bench.of(PrefillEnded)
    assert ended.code == "node_lost"
