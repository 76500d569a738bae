"""The prefill role alone, with the decode side played by the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import pytest

from penstock.core.errors import InternalError
from penstock.core.ids import AttemptKey, Ticket, WorkerKey
from penstock.core.tickets import TicketFacts, prove
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.effects import MessageArrived, PeerLost, PeerUp, Renewing, SendBlocks, SendMessage, Withdraw
from penstock.kvtransfer.source import PushSizes, SourceTable
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
    Reached,
    StartPrefill,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import WorkerCore
from penstock.worker.role import Tell

PROMPT = list(range(1, 12))  # 11 tokens: two full blocks of 4 and a part
ME, DECODE = WorkerKey("prefill-0", "0" * 16), WorkerKey("decode-0", "d" * 16)
TICKET = b"t" * 16
CLUSTER_KEY = b"k" * 32
WHOLE = PushSizes(2, most=64, least=1000)  # nothing leaves by layers
M = TypeVar("M")


def proven(message: StartPrefill, key: bytes = CLUSTER_KEY) -> StartPrefill:
    """The command with the proof that a router of this cluster gives it."""
    decode = WorkerKey(message.decode_worker, message.decode_epoch)
    attempt, tokens = AttemptKey(message.request_id, message.attempt), message.prompt_ids + message.output_ids
    facts = TicketFacts(Ticket(message.ticket), ME, decode, attempt, tokens, message.timeout_s)
    return msgspec.structs.replace(message, proof=prove(key, facts))


def grant(stop: int = 3, held: int = 0, ticket: bytes = TICKET, generation: int = 1) -> Grant:
    return Grant(ticket, generation, held, stop)


class Bench:
    """One prefill worker under test; collects what it sends."""

    def __init__(self, num_blocks: int = 16, max_batch_tokens: int = 4, sizes: PushSizes = WHOLE) -> None:
        self.engine, self.clock = FakeEngine(num_blocks), FakeClock(0.0)
        self.pool = BlockPool(num_blocks, 4)
        self.role = PrefillRole(ME, self.engine.spec, self.pool, SourceTable(5.0, 5.0, sizes), CLUSTER_KEY)
        self.core = WorkerCore(
            ME, "prefill", self.engine, self.pool, [self.role], self.clock, max_batch_tokens=max_batch_tokens
        )
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
        message = StartPrefill(request_id, 1, ticket, **(values | changes))
        self.command(message if "proof" in changes else proven(message))

    def command(self, message: ToWorker) -> None:
        self.role.on_command(message, self.clock.now())
        self.take(self.role.take_effects())

    def hear(self, message: HandoffMessage) -> None:
        self.take(self.core.on_link(MessageArrived(DECODE, message)))

    def step(self, on_layers: Callable[[int], None] = lambda num_layers: None) -> None:
        """`on_layers` runs within the step, before what it hears of leaves."""
        batch, effects = self.core.begin_step()
        self.take(effects)

        def hook(num_layers: int) -> None:
            on_layers(num_layers)
            self.take(self.core.layers_computed(batch, num_layers))

        if batch:
            self.take(self.core.end_step(batch, self.core.compute(batch, hook)))

    def of(self, kind: type[M]) -> list[M]:
        return [m for m in self.sent if isinstance(m, kind)]


def test_prefill_offer_leaves_before_the_first_chunk_and_done_after_the_last() -> None:
    bench = Bench()
    bench.start()
    assert bench.of(Offer) == []
    bench.step()
    [offer] = bench.of(Offer)
    assert (offer.ticket, offer.num_tokens, offer.num_blocks, offer.block_size, offer.reached) == (TICKET, 11, 3, 4, 1)
    bench.hear(grant())
    for _ in range(2):
        bench.step()
    assert bench.of(Reached) == [Reached(TICKET, 2), Reached(TICKET, 3)]
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
    bench.hear(grant())
    assert bench.pool.num_free_blocks == 13
    bench.hear(Ack(TICKET, 1))
    assert (bench.pool.num_free_blocks, bench.pool.num_cached_blocks) == (16, 2)
    assert bench.of(PrefillEnded) == [PrefillEnded("r", 1, True)]


def test_prefill_start_beyond_the_bound_is_refused_and_may_be_tried_elsewhere() -> None:
    bench = Bench()
    bench.role.max_requests = 1
    bench.start("a")
    bench.start("b", b"u" * 16)
    [ended] = bench.of(PrefillEnded)
    assert (ended.request_id, ended.ok, ended.code) == ("b", False, "overloaded")


def test_prefill_same_prompt_again_reuses_its_blocks() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.start()
    bench.step()
    bench.hear(grant())
    bench.hear(Ack(TICKET, 1))
    bench.start("again", b"u" * 16)
    bench.step()
    bench.hear(grant(ticket=b"u" * 16, generation=2))
    assert bench.of(Done)[-1].phases.cached_tokens == 8


def test_prefill_held_blocks_do_not_travel() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.start()
    bench.step()
    bench.hear(grant(held=2))
    [push] = bench.of(SendBlocks)
    assert push.ordinals == (2,)


def test_prefill_n_choices_samples_each_first_token() -> None:
    bench = Bench(max_batch_tokens=64)
    params = SamplingParams(max_tokens=4, n=3, seed=9)
    bench.start(params=params)
    bench.step()
    bench.hear(grant())
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
    was_offered = moment != "waiting"
    assert len(bench.of(Withdraw)) == was_offered, "nothing leaves any more"
    assert [effect.is_alive for effect in bench.of(Renewing)] == [True, False] * was_offered


def test_prefill_full_pool_makes_the_next_wait_until_blocks_return() -> None:
    bench = Bench(num_blocks=4, max_batch_tokens=64)
    bench.start("a", b"a" * 16)
    bench.start("b", b"b" * 16, prompt_ids=pack_ids(list(range(100, 111))))
    bench.step()
    assert [o.ticket for o in bench.of(Offer)] == [b"a" * 16]
    bench.hear(grant(ticket=b"a" * 16))
    bench.hear(Ack(b"a" * 16, 1))
    bench.step()
    assert [o.ticket for o in bench.of(Offer)] == [b"a" * 16, b"b" * 16]


def test_prefill_engine_failure_ends_only_that_request() -> None:
    bench = Bench(max_batch_tokens=64)
    bench.engine._fails = lambda entry: entry.seq.key.request_id == "bad"
    bench.start("good", b"g" * 16)
    bench.start("bad", b"b" * 16, prompt_ids=pack_ids([50, 51, 52]))
    bench.step()
    bench.hear(grant(ticket=b"g" * 16))
    [ended] = bench.of(PrefillEnded)
    assert (ended.request_id, ended.code) == ("bad", InternalError.code)
    assert [d.ticket for d in bench.of(Done)] == [b"g" * 16]


def test_prefill_without_a_link_fails_at_once() -> None:
    bench = Bench()
    bench.start(decode_epoch="e" * 16)
    [ended] = bench.of(PrefillEnded)
    assert ended.code == "node_lost"


# ---- within the step ----


def pieces(bench: Bench) -> list[tuple[tuple[int, ...], int, int]]:
    return [(push.ordinals, push.first_layer, push.num_layers) for push in bench.of(SendBlocks)]


def test_prefill_granted_layers_leave_while_the_next_layer_is_computed() -> None:
    bench = Bench(max_batch_tokens=64, sizes=PushSizes(2, most=64, least=1))
    bench.start()
    seen: list[int] = []

    def on_layers(num_layers: int) -> None:
        if num_layers == 1:
            bench.take(bench.core.on_link(MessageArrived(DECODE, grant())))
        seen.append(len(pieces(bench)))

    bench.step(on_layers)
    assert seen == [0, 1]
    assert pieces(bench) == [((0, 1, 2), 0, 1), ((0, 1, 2), 1, 1)]
    assert isinstance(bench.sent[-1], Done)


def test_prefill_part_of_a_block_leaves_only_with_the_prompts_last_chunk() -> None:
    """Chunks of 6 tokens and blocks of 4: block 1 is half full after the first chunk."""
    bench = Bench(max_batch_tokens=6, sizes=PushSizes(2, most=64, least=1))
    bench.start()
    bench.step(lambda _: None)
    bench.hear(grant())
    bench.step()
    assert pieces(bench) == [((0,), 0, 2), ((1, 2), 0, 1), ((1, 2), 1, 1)]


def test_prefill_step_that_fails_in_the_middle_and_is_run_again_sends_each_layer_once() -> None:
    bench = Bench(max_batch_tokens=64, sizes=PushSizes(2, most=64, least=1))
    bench.start()

    def breaks(num_layers: int) -> None:
        if num_layers == 1:
            bench.take(bench.core.on_link(MessageArrived(DECODE, grant())))
        else:
            raise RuntimeError("the step breaks after its first layer has left")

    bench.step(breaks)
    assert pieces(bench) == [((0, 1, 2), 0, 1), ((0, 1, 2), 1, 1)]
    [done] = bench.of(Done)
    expected = expected_tokens(PROMPT, SamplingParams(max_tokens=4, temperature=0))[0][0]
    assert done.first_tokens[0].token_id == expected


def test_prefill_request_whose_step_fails_for_good_withdraws_what_has_left() -> None:
    bench = Bench(max_batch_tokens=64, sizes=PushSizes(2, most=64, least=1))
    bench.start()

    def breaks(num_layers: int) -> None:
        bench.take(bench.core.on_link(MessageArrived(DECODE, grant())))
        bench.take(bench.core.layers_computed([(bench.role, entry) for entry in entries], 1))
        bench.engine._fails = lambda entry: True
        raise RuntimeError("the step breaks")

    batch, effects = bench.core.begin_step()
    entries = [entry for _, entry in batch]
    bench.take(effects)
    bench.take(bench.core.end_step(batch, bench.core.compute(batch, breaks)))
    assert pieces(bench) == [((0, 1, 2), 0, 1)]
    kinds = [type(item) for item in bench.sent]
    assert kinds[kinds.index(SendBlocks) :] == [SendBlocks, Failed, Withdraw, Renewing, PrefillEnded]
    assert bench.pool.num_free_blocks == 16


# ---- tickets ----


def refused(bench: Bench, message: StartPrefill) -> PrefillEnded:
    """The one answer to a command that was refused."""
    before = len(bench.sent)
    bench.command(message)
    [ended] = bench.sent[before:]
    assert isinstance(ended, PrefillEnded)
    assert (ended.request_id, ended.ok) == (message.request_id, False)
    return ended


@pytest.mark.parametrize(
    "changes",
    [
        {"ticket": b"u" * 16},
        {"prompt_ids": pack_ids([*PROMPT, 5])},
        {"output_ids": pack_ids([5])},
        {"decode_worker": "decode-1"},
        {"decode_epoch": "e" * 16},
        {"request_id": "other"},
        {"attempt": 2},
        {"timeout_s": 11.0},
        {"proof": bytes(16)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_prefill_with_a_ticket_made_for_something_else_is_refused_and_disturbs_nobody(changes: dict[str, Any]) -> None:
    bench = Bench(max_batch_tokens=64)
    bench.start("good", b"g" * 16)
    for peer in (WorkerKey("decode-1", DECODE.epoch), WorkerKey(DECODE.worker_id, "e" * 16)):
        bench.take(bench.core.on_link(PeerUp(peer, "test")))
    params = SamplingParams(max_tokens=4, temperature=0)
    honest = proven(StartPrefill("bad", 1, TICKET, pack_ids(PROMPT), params, *DECODE, 10.0))
    ended = refused(bench, msgspec.structs.replace(honest, **changes))
    assert ended.code == "protocol_error"
    assert "ticket was not made for this; are all processes of this cluster using one key?" in ended.message
    assert [key.request_id for key in bench.role.active()] == ["good"]
    bench.step()
    bench.hear(grant(ticket=b"g" * 16))
    bench.hear(Ack(b"g" * 16, 1))
    assert [e.request_id for e in bench.of(PrefillEnded) if e.ok] == ["good"]


def test_prefill_with_a_ticket_for_another_worker_or_of_another_cluster_is_refused() -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    message = StartPrefill("r", 1, TICKET, pack_ids(PROMPT), params, *DECODE, 10.0)
    attempt = AttemptKey("r", 1)
    facts = TicketFacts(Ticket(TICKET), WorkerKey("prefill-1", ME.epoch), DECODE, attempt, pack_ids(PROMPT), 10.0)
    for taken in (
        msgspec.structs.replace(message, proof=prove(CLUSTER_KEY, facts)),
        proven(message, key=b"another cluster's key"),
    ):
        bench = Bench()
        assert refused(bench, taken).code == "protocol_error"
        assert bench.role.active() == []


def test_prefill_ticket_in_use_is_refused_for_a_second_request() -> None:
    bench = Bench()
    bench.start("first")
    params = SamplingParams(max_tokens=4, temperature=0)
    second = proven(StartPrefill("second", 1, TICKET, pack_ids(PROMPT), params, *DECODE, 10.0))
    ended = refused(bench, second)
    assert (ended.code, ended.message) == ("protocol_error", "the ticket is in use")
    assert [key.request_id for key in bench.role.active()] == ["first"]


def test_prefill_command_replayed_after_its_end_starts_nothing() -> None:
    bench = Bench(max_batch_tokens=64)
    params = SamplingParams(max_tokens=4, temperature=0)
    message = proven(StartPrefill("r", 1, TICKET, pack_ids(PROMPT), params, *DECODE, 10.0))
    bench.command(message)
    bench.step()
    bench.hear(grant())
    bench.hear(Ack(TICKET, 1))
    before = len(bench.sent)
    bench.command(message)
    bench.step()
    assert bench.sent[before:] == []
    assert bench.role.load().stale_messages == 1
