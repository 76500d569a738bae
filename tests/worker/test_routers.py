"""Several routers on one worker: each has its requests, its books, its life, and none that of another."""

from __future__ import annotations

from penstock.core.ids import MAIN_ROUTER, AttemptKey, WorkerKey
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.destination import DestinationTable
from penstock.protocol.messages import (
    Abort,
    AttemptFailed,
    ChoiceState,
    FromRouter,
    Output,
    Peer,
    Peers,
    ResetPrefixCache,
    SetRole,
    StartDecode,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import CoreEffect, SetPeers, WorkerCore
from penstock.worker.heartbeat import HeartbeatBuilder
from penstock.worker.role import Tell
from penstock.worker.routers import RouterGone, Routers, Tally, blocks_to_go_on, others_load
from penstock.worker.turn_watch import TurnWatch

PROMPT, OTHER_PROMPT = [3, 4, 5, 6, 7], [9, 8, 7]
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
FIRST, SECOND = "a" * 16, "b" * 16
SIDE = "side"


class Bench:
    """A decode worker with blocks of 4 tokens."""

    def __init__(self) -> None:
        engine, me = FakeEngine(), WorkerKey("w", "0" * 16)
        self.pool = BlockPool(64, 4)
        roles = [DecodeRole(me, engine.spec, self.pool, DestinationTable(5.0), b"k" * 32)]
        self.core = WorkerCore(me, "decode", engine, self.pool, list(roles), FakeClock())
        self.told: dict[str, list[object]] = {MAIN_ROUTER: [], SIDE: []}
        self.number = 0

    def command(self, body: ToWorker, router: str = MAIN_ROUTER, epoch: str = FIRST) -> list[CoreEffect]:
        self.number += 1
        return self.take(self.core.on_frame(FromRouter(epoch, self.number, body, router)))

    def take(self, effects: list[CoreEffect]) -> list[CoreEffect]:
        for effect in effects:
            if isinstance(effect, Tell):
                self.told[effect.router].append(effect.message)
        return effects

    def step(self) -> None:
        batch, effects = self.core.begin_step()
        self.take(effects + self.core.end_step(batch, self.core.compute(batch)))
        self.core.check_invariants()

    def run(self) -> None:
        while self.core.has_work():
            self.step()

    def tokens(self, router: str) -> list[int]:
        items = [item for message in self.told[router] if isinstance(message, Output) for item in message.items]
        return [token.token_id for item in items for token in item.tokens]

    def failed(self, router: str) -> list[str]:
        return [message.request_id for message in self.told[router] if isinstance(message, AttemptFailed)]


def start(request_id: str = "r", prompt: list[int] = PROMPT) -> StartDecode:
    return StartDecode(request_id, 1, pack_ids(prompt), PARAMS, [ChoiceState(0)], 60.0)


def test_requests_of_two_routers_with_one_id_are_two_requests() -> None:
    bench = Bench()
    bench.command(start(), MAIN_ROUTER)
    bench.command(start(prompt=OTHER_PROMPT), SIDE, SECOND)
    bench.run()
    assert bench.tokens(MAIN_ROUTER) == expected_tokens(PROMPT, PARAMS)[0]
    assert bench.tokens(SIDE) == expected_tokens(OTHER_PROMPT, PARAMS)[0]


def test_abort_of_one_router_leaves_the_same_id_of_another_alone() -> None:
    bench = Bench()
    bench.command(start(), MAIN_ROUTER)
    bench.command(start(), SIDE, SECOND)
    bench.command(Abort("r", 1), SIDE, SECOND)
    bench.run()
    assert bench.failed(SIDE) == ["r"]
    assert bench.failed(MAIN_ROUTER) == []
    assert bench.tokens(MAIN_ROUTER) == expected_tokens(PROMPT, PARAMS)[0]


def test_new_epoch_of_one_router_voids_what_that_router_asked_for() -> None:
    bench = Bench()
    bench.command(start("mine"), MAIN_ROUTER)
    bench.command(start("old"), SIDE, SECOND)
    bench.command(start("new"), SIDE, "c" * 16)
    assert bench.core.snapshot().active == (AttemptKey("mine", 1), AttemptKey("new", 1, SIDE))
    bench.run()
    assert bench.tokens(MAIN_ROUTER) == expected_tokens(PROMPT, PARAMS)[0]
    assert bench.pool.num_free_blocks == bench.pool.num_blocks


def test_router_that_is_gone_leaves_its_blocks_and_nobody_else_notices() -> None:
    bench = Bench()
    bench.command(start("mine"), MAIN_ROUTER)
    bench.command(start("theirs"), SIDE, SECOND)
    bench.step()
    held = bench.pool.num_blocks - bench.pool.num_free_blocks
    bench.take(bench.core.on_router_gone(RouterGone(SIDE)))
    assert bench.pool.num_blocks - bench.pool.num_free_blocks < held
    assert bench.core.snapshot().active == (AttemptKey("mine", 1),)
    assert bench.core.on_router_gone(RouterGone(SIDE)) == []
    bench.run()
    assert bench.tokens(MAIN_ROUTER) == expected_tokens(PROMPT, PARAMS)[0]


def test_router_that_was_cut_off_and_speaks_again_is_served() -> None:
    bench = Bench()
    bench.command(start("one"), SIDE, SECOND)
    bench.core.on_router_gone(RouterGone(SIDE))
    bench.command(start("two"), SIDE, SECOND)
    bench.run()
    assert bench.tokens(SIDE) == expected_tokens(PROMPT, PARAMS)[0]


def test_heartbeats_speak_to_each_router_of_its_own_attempts_and_of_what_the_others_take() -> None:
    bench = Bench()
    beats = {name: HeartbeatBuilder(TurnWatch(FakeClock()), name) for name in (MAIN_ROUTER, SIDE)}
    for name, epoch in ((MAIN_ROUTER, FIRST), (SIDE, SECOND)):
        beats[name].on_frame(FromRouter(epoch, bench.number + 1, start(name), name))
        bench.command(start(name), name, epoch)
    bench.step()
    snapshot = bench.core.snapshot()
    for name, number in ((MAIN_ROUTER, 1), (SIDE, 2)):
        beat = beats[name].build(snapshot, [])
        assert beat.active == [(name, 1)]
        assert beat.received == number
        assert beat.load.running == 2
        assert beat.others is not None
        assert (beat.others.attempts, beat.others.blocks, beat.others.streams, beat.others.running) == (1, 2, 1, 1)
    bench.run()
    assert beats[SIDE].build(bench.core.snapshot(), []).others is None


def test_worker_with_one_router_counts_nothing_for_others() -> None:
    bench = Bench()
    bench.command(start())
    assert bench.core.snapshot().tallies == {}


def peer(name: str, role: str = "prefill") -> Peer:
    return Peer(name, "0" * 16, role, f"/kv/{name}")  # type: ignore[arg-type]


def listed(effects: list[CoreEffect]) -> list[str]:
    [effect] = effects
    assert isinstance(effect, SetPeers)
    return sorted(f"{peer.worker_id}:{peer.role}" for peer in effect.peers)


def test_peers_are_all_that_some_router_takes_for_live() -> None:
    bench = Bench()
    bench.command(Peers([peer("p0"), peer("p1")]), MAIN_ROUTER)
    assert listed(bench.command(Peers([peer("p0")]), SIDE, SECOND)) == ["p0:prefill", "p1:prefill"]
    assert listed(bench.command(Peers([peer("p0", "both")]), MAIN_ROUTER)) == ["p0:both"]


def test_restarted_router_that_does_not_know_everyone_yet_cuts_no_link_of_another() -> None:
    bench = Bench()
    bench.command(Peers([peer("p0"), peer("p1")]), MAIN_ROUTER)
    bench.command(Peers([peer("p0"), peer("p1")]), SIDE, SECOND)
    assert listed(bench.command(Peers([]), SIDE, "c" * 16)) == ["p0:prefill", "p1:prefill"]


def test_links_that_only_a_router_that_is_gone_wanted_end_with_it() -> None:
    bench = Bench()
    bench.command(Peers([peer("p0")]), MAIN_ROUTER)
    bench.command(Peers([peer("p0"), peer("p1")]), SIDE, SECOND)
    assert listed(bench.core.on_router_gone(RouterGone(SIDE))) == ["p0:prefill"]


def test_last_router_that_goes_leaves_the_links_for_the_next() -> None:
    bench = Bench()
    bench.command(Peers([peer("p0")]), MAIN_ROUTER)
    assert bench.core.on_router_gone(RouterGone(MAIN_ROUTER)) == []


def test_role_and_prefix_cache_are_the_workers_own_whoever_speaks() -> None:
    bench = Bench()
    bench.command(start(), MAIN_ROUTER)
    bench.run()
    assert bench.pool.num_cached_blocks
    bench.command(ResetPrefixCache(), SIDE, SECOND)
    assert not bench.pool.num_cached_blocks
    bench.command(SetRole("both"), SIDE, SECOND)  # it cannot host prefill
    assert bench.core.snapshot().role == "decode"


def test_routers_note_the_highest_number_of_each() -> None:
    routers = Routers()
    assert not routers.hear(FromRouter(FIRST, 3, Peers([])))
    assert not routers.hear(FromRouter(FIRST, 2, Peers([])))
    assert not routers.hear(FromRouter(SECOND, 1, Peers([]), SIDE))
    assert routers.handled == {MAIN_ROUTER: (FIRST, 3), SIDE: (SECOND, 1)}
    assert routers.hear(FromRouter(SECOND, 1, Peers([])))
    assert routers.epochs == {MAIN_ROUTER: SECOND, SIDE: SECOND}


def test_others_load_leaves_the_router_itself_out() -> None:
    tallies = {"a": Tally(1, 2, 3, 1, 5), "b": Tally(1, 1, 1, 1, 1), "c": Tally(2, 3, 4, 5, 6)}
    others = others_load(tallies, "a")
    assert others is not None
    assert (others.attempts, others.blocks, others.streams, others.running, others.queued_tokens) == (3, 4, 5, 6, 7)
    assert others_load({"a": Tally(1)}, "a") is None


def test_blocks_to_go_on_share_the_full_blocks_of_the_prompt() -> None:
    assert blocks_to_go_on([9], 9, 4) == 3
    assert blocks_to_go_on([8], 8, 4) == 3  # the next token begins a block
    assert blocks_to_go_on([9, 12], 9, 4) == 2 + 1 + 2
