"""2,000 damaged frames of every message type that a worker can hear, beside a live request: its tokens are the same."""

from __future__ import annotations

import random

import pytest

from penstock.core.errors import ProtocolError
from penstock.core.ids import AttemptKey, Ticket, WorkerKey
from penstock.core.tickets import TicketFacts, prove
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.effects import MessageArrived, PeerUp
from penstock.kvtransfer.source import PushSizes, SourceTable
from penstock.prefill_node.role import PrefillRole
from penstock.protocol import codec
from penstock.protocol.messages import (
    Abort,
    Ack,
    Cancel,
    ChoiceState,
    Done,
    Drain,
    Failed,
    FromRouter,
    Grant,
    HandoffMessage,
    KvPing,
    KvProof,
    KvReady,
    KvRefuse,
    Measure,
    Offer,
    Output,
    Peer,
    Peers,
    Phases,
    Push,
    Reached,
    Renew,
    ResetPrefixCache,
    SampledToken,
    StartDecode,
    StartPrefill,
    Taken,
    ToWorker,
    Welcome,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import CoreEffect, WorkerCore
from penstock.worker.role import Role, Tell

NUM_FRAMES = 2000
EPOCH, TICKET = "a" * 16, b"t" * 16
PEER, ME = WorkerKey("peer", "b" * 16), WorkerKey("w", "0" * 16)
CLUSTER_KEY = b"k" * 32
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPT = [5, 6, 7, 8, 9]
PROOFS = {
    source: prove(CLUSTER_KEY, TicketFacts(Ticket(TICKET), source, other, AttemptKey("bad", 1), pack_ids(PROMPT), 60.0))
    for source, other in ((PEER, ME), (ME, PEER))
}
START = StartDecode(
    "bad", 1, pack_ids(PROMPT), PARAMS, [ChoiceState(0)], 60.0, TICKET, *PEER, proof=PROOFS[PEER]
)  # fmt: skip
COMMANDS: list[ToWorker] = [
    Welcome(),
    Peers([Peer("peer", PEER.epoch, "prefill", "unix:/none")]),
    StartPrefill("bad", 1, TICKET, pack_ids(PROMPT), PARAMS, *PEER, 60.0, proof=PROOFS[ME]),
    START,
    Abort("bad", 1),
    Drain(),
    ResetPrefixCache(),
]
HANDOFF: list[HandoffMessage] = [
    KvRefuse("no"),
    KvProof(b"m" * 16),
    KvReady("float32"),
    Offer(TICKET, 5, 2, 4, 1, PROOFS[PEER]),
    Reached(TICKET, 2),
    Grant(TICKET, 1, 0, 2),
    Push(TICKET, 1, 0, 2, [0, 1], b"d" * 16, [3, 4]),
    Push(TICKET, 1, 0, 2, [0, 1], b"d" * 16, staged=1 << 30),
    Taken(),
    Measure(1 << 20),
    Done(TICKET, 1, 2, 5, (SampledToken(7),), Phases(), b"d" * 16),
    Failed(TICKET, "internal_error", "broken"),
    Ack(TICKET, 1),
    Cancel(TICKET, "cancelled", "gone"),
    Renew([TICKET]),
    KvPing(),
]


def damaged(frame: bytes, rng: random.Random) -> bytes:
    """`frame` with bytes changed, cut, doubled or put in."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(4):
            case 0 if data:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 6)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 6))
            case _:
                data += data[at : at + 8]
    return bytes(data)


class Bench:
    """A worker with both roles and one live request that takes a step for each damaged frame or two."""

    def __init__(self) -> None:
        engine, pool = FakeEngine(num_blocks=256), BlockPool(256, 4)
        roles: list[Role] = [
            DecodeRole(ME, engine.spec, pool, DestinationTable(5.0), CLUSTER_KEY),
            PrefillRole(ME, engine.spec, pool, SourceTable(5.0, 5.0, PushSizes(2, 8, 1)), CLUSTER_KEY),
        ]
        self.core = WorkerCore(ME, "both", engine, pool, roles, FakeClock())
        self.core.on_link(PeerUp(PEER, "test"))
        self.tokens: list[int] = []
        live = StartDecode("live", 1, pack_ids(PROMPT), PARAMS, [ChoiceState(0)], 1e6)
        self.take(self.core.on_frame(FromRouter(EPOCH, 1, live)))

    def take(self, effects: list[CoreEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell) and isinstance(effect.message, Output):
                items = [item for item in effect.message.items if item.request_id == "live"]
                self.tokens += [token.token_id for item in items for token in item.tokens]

    def step(self) -> None:
        batch, effects = self.core.begin_step()
        self.take(effects)
        if batch:
            self.take(self.core.end_step(batch, self.core.compute(batch)))
        self.core.check_invariants()


@pytest.mark.parametrize("message", COMMANDS, ids=lambda m: type(m).__name__)
def test_damaged_commands_change_nothing_for_a_live_request(message: ToWorker) -> None:
    bench, rng, refused = Bench(), random.Random(1), 0
    frame = codec.from_router.encode(FromRouter(EPOCH, 2, message))
    for number in range(NUM_FRAMES):
        try:
            command = codec.from_router.decode(damaged(frame, rng))
        except ProtocolError:
            refused += 1
        else:  # what still decodes is a command; one that aborts the live request or comes from a new router may end it
            is_ours = command.router_epoch == EPOCH and getattr(command.body, "request_id", "") != "live"
            if is_ours:
                bench.take(bench.core.on_frame(command))
        if number % 80 == 0:
            bench.step()
    assert refused > NUM_FRAMES // 4
    assert bench.tokens == expected_tokens(PROMPT, PARAMS)[0]


@pytest.mark.parametrize("message", HANDOFF, ids=lambda m: type(m).__name__)
def test_damaged_hand_off_messages_change_nothing_for_a_live_request(message: HandoffMessage) -> None:
    bench, rng, refused = Bench(), random.Random(2), 0
    bench.take(bench.core.on_frame(FromRouter(EPOCH, 2, START)))
    assert AttemptKey("bad", 1) in bench.core.snapshot().active
    frame = codec.handoff.encode(message)
    for number in range(NUM_FRAMES):
        try:
            arrived = codec.handoff.decode(damaged(frame, rng))
        except ProtocolError:
            refused += 1
        else:
            bench.take(bench.core.on_link(MessageArrived(PEER, arrived)))
        if number % 80 == 0:
            bench.step()
    assert refused > NUM_FRAMES // 4
    assert bench.tokens == expected_tokens(PROMPT, PARAMS)[0]
