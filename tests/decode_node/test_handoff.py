"""The decode role as the destination of hand-offs: whose tickets it takes, and what it gives room to when."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from penstock.core.ids import AttemptKey, BlockId, Ticket, WorkerKey
from penstock.core.tickets import TicketFacts, prove
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.digest import block_digest, combined_digest
from penstock.kvtransfer.effects import (
    AcceptBlocks,
    BlocksArrived,
    MessageArrived,
    PeerUp,
    Renewing,
    Revoke,
    Revoked,
    SendMessage,
)
from penstock.protocol.messages import (
    Abort,
    Ack,
    AttemptFailed,
    Cancel,
    ChoiceState,
    Done,
    Grant,
    HandoffMessage,
    Offer,
    Output,
    Phases,
    Reached,
    SampledToken,
    StartDecode,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.fake_engine import FakeEngine
from penstock.worker.role import Tell

PROMPT = list(range(1, 20))  # 19 tokens: five blocks of 4
PEER, OTHER_PEER, ME = (
    WorkerKey("prefill-0", "a" * 16),
    WorkerKey("prefill-1", "b" * 16),
    WorkerKey("decode-0", "0" * 16),
)
KEY = b"k" * 32
TICKET = b"t" * 16


def proven(message: StartDecode, me: WorkerKey = ME, key: bytes = KEY) -> StartDecode:
    """The command with the proof that a router of this cluster gives it."""
    assert message.ticket is not None
    assert message.prefill_worker is not None
    assert message.prefill_epoch is not None
    source = WorkerKey(message.prefill_worker, message.prefill_epoch)
    tokens = message.prompt_ids + (message.choices[0].output_ids if message.params.n == 1 else b"")
    attempt = AttemptKey(message.request_id, message.attempt)
    facts = TicketFacts(Ticket(message.ticket), source, me, attempt, tokens, message.timeout_s)
    return msgspec.structs.replace(message, proof=prove(key, facts))


def start(request_id: str = "r", ticket: bytes = TICKET, peer: WorkerKey = PEER, **changes: Any) -> StartDecode:
    values: dict[str, Any] = {
        "prompt_ids": pack_ids(PROMPT),
        "params": SamplingParams(max_tokens=4, ignore_eos=True),
        "choices": [ChoiceState(0)],
        "timeout_s": 10.0,
        "ticket": ticket,
        "prefill_worker": peer.worker_id,
        "prefill_epoch": peer.epoch,
    }
    return proven(StartDecode(request_id, 1, **(values | changes)))


class Bench:
    """One decode role, audited after every call."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.engine, self.pool = FakeEngine(num_blocks), BlockPool(num_blocks, 4)
        self.table = DestinationTable(5.0)
        self.role = DecodeRole(ME, self.engine.spec, self.pool, self.table, KEY)
        self.held_elsewhere: list[BlockId] = []
        for peer in (PEER, OTHER_PEER):
            self.role.on_link(PeerUp(peer, "test"), 0.0)

    def take(self) -> list[object]:
        """What was said now."""
        fresh: list[object] = [e.message if isinstance(e, Tell | SendMessage) else e for e in self.role.take_effects()]
        self.pool.check_invariants([self.held_elsewhere, *self.role.owners()])
        self.role.check_invariants()
        self.table.check_invariants()
        return fresh

    def command(self, message: ToWorker) -> list[object]:
        self.role.on_command(message, 0.0)
        return self.take()

    def hear(self, message: HandoffMessage, peer: WorkerKey = PEER) -> list[object]:
        self.role.on_link(MessageArrived(peer, message), 0.0)
        return self.take()

    def arrive(self, *ordinals: int, ticket: bytes = TICKET, generation: int = 1) -> list[object]:
        digests = tuple(digest_of(ordinal) for ordinal in ordinals)
        self.role.on_link(BlocksArrived(PEER, Ticket(ticket), generation, ordinals, (), digests), 0.0)
        return self.take()


def digest_of(ordinal: int) -> bytes:
    return combined_digest([(0, 2, block_digest(memoryview(bytes([ordinal]))))])


def offer(reached: int, message: StartDecode, **changes: Any) -> Offer:
    assert message.ticket is not None
    return msgspec.structs.replace(Offer(message.ticket, 19, 5, 4, reached, message.proof), **changes)


def done(held: int = 0, **changes: Any) -> Done:
    digests = b"".join(map(digest_of, range(held, 5)))
    return msgspec.structs.replace(Done(TICKET, 1, 5 - held, 19, (SampledToken(7),), Phases(), digests), **changes)


# ---- room in portions ----


def test_room_is_given_as_prefill_advances_and_no_sooner() -> None:
    bench, message = Bench(), start()
    assert bench.command(message) == []
    assert bench.pool.num_free_blocks == 16
    alive, accept, granted = bench.hear(offer(1, message))
    assert alive == Renewing(PEER, Ticket(TICKET), is_alive=True)
    assert isinstance(accept, AcceptBlocks)
    assert (accept.first, accept.stop, accept.num_tokens) == (0, 1, 19)
    assert granted == Grant(TICKET, 1, 0, 1)
    for reached, free in ((3, 13), (5, 11)):
        accept, granted = bench.hear(Reached(TICKET, reached))
        assert granted == Grant(TICKET, 1, 0, reached)
        assert isinstance(accept, AcceptBlocks)
        assert (accept.stop, len(accept.table)) == (reached, reached)
        assert bench.pool.num_free_blocks == free
    assert bench.arrive(0, 1, 2, 3, 4) == []
    said = bench.hear(done())
    assert said[0] == Ack(TICKET, 1)
    assert Renewing(PEER, Ticket(TICKET), is_alive=False) in said
    [output] = [item for item in said if isinstance(item, Output)]
    assert [token.token_id for token in output.items[0].tokens] == [7]


def test_full_pool_grants_a_part_and_the_rest_when_there_is_room() -> None:
    bench, message = Bench(num_blocks=8), start()
    bench.held_elsewhere = bench.pool.allocate(5)
    bench.command(message)
    bench.hear(offer(2, message))
    [_, granted] = bench.hear(Reached(TICKET, 5))
    assert granted == Grant(TICKET, 1, 0, 3)
    bench.pool.free(bench.held_elsewhere)
    bench.held_elsewhere = []
    [_, granted] = bench.arrive(0)
    assert granted == Grant(TICKET, 1, 0, 5)


def test_cut_short_hand_off_gets_nothing_more_and_frees_when_no_write_can_follow() -> None:
    bench, message = Bench(), start()
    bench.command(message)
    bench.hear(offer(2, message))
    said = bench.command(Abort("r", 1))
    assert [type(item) for item in said] == [AttemptFailed, Revoke, Cancel]
    assert bench.hear(Reached(TICKET, 5)) == []
    assert bench.pool.num_free_blocks == 14
    bench.role.on_link(Revoked(PEER, Ticket(TICKET)), 0.1)
    assert bench.take() == [Renewing(PEER, Ticket(TICKET), is_alive=False)]
    assert bench.pool.num_free_blocks == 16


@pytest.mark.parametrize(
    "word",
    [done(digests=b"".join([digest_of(1), *map(digest_of, (0, 2, 3, 4))])), done(digests=bytes(40))],
    ids=["swapped", "wrong"],
)
def test_done_that_speaks_of_other_bytes_fails_retriably_and_nothing_is_published(word: Done) -> None:
    bench, message = Bench(), start()
    bench.command(message)
    bench.hear(offer(5, message))
    bench.arrive(0, 1, 2, 3, 4)
    said = bench.hear(word)
    assert [type(item) for item in said] == [Revoke, Cancel]
    bench.role.on_link(Revoked(PEER, Ticket(TICKET)), 0.1)
    [failed] = [item for item in bench.take() if isinstance(item, AttemptFailed)]
    assert (failed.code, failed.retriable) == ("checksum_mismatch", True)
    assert (bench.pool.num_free_blocks, bench.pool.num_cached_blocks) == (16, 0)
    assert bench.role.load().failed_handoffs == 1


def test_offer_for_another_sequence_is_cancelled_and_fails() -> None:
    bench, message = Bench(), start()
    bench.command(message)
    said = bench.hear(offer(1, message, num_tokens=20))
    assert [type(item) for item in said if not isinstance(item, Renewing)] == [Cancel, AttemptFailed]
    assert bench.pool.num_free_blocks == 16


# ---- tickets ----


def refused(bench: Bench, message: StartDecode) -> AttemptFailed:
    """The one answer to a command that was refused."""
    [failed] = bench.command(message)
    assert isinstance(failed, AttemptFailed)
    assert failed.request_id == message.request_id
    return failed


@pytest.mark.parametrize(
    "changes",
    [
        {"ticket": b"u" * 16},
        {"prompt_ids": pack_ids([*PROMPT, 5])},
        {"choices": [ChoiceState(0, pack_ids([5]))]},
        {"prefill_worker": "prefill-1", "prefill_epoch": "b" * 16},
        {"request_id": "other"},
        {"attempt": 2},
        {"timeout_s": 11.0},
        {"proof": bytes(16)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_start_with_a_ticket_made_for_something_else_is_refused_and_disturbs_nobody(changes: dict[str, Any]) -> None:
    bench = Bench()
    bench.command(start("good", b"g" * 16))
    failed = refused(bench, msgspec.structs.replace(start("bad"), **changes))
    assert failed.code == "protocol_error"
    assert "ticket was not made for this; are all processes of this cluster using one key?" in failed.message
    assert [key.request_id for key in bench.role.active()] == ["good"]
    assert bench.table.active() == [b"g" * 16]
    said = bench.hear(offer(5, start("good", b"g" * 16)))
    assert [type(item) for item in said] == [Renewing, AcceptBlocks, Grant]


def test_start_with_a_ticket_for_another_worker_or_of_another_cluster_is_refused() -> None:
    message = start()
    for taken in (
        proven(message, me=WorkerKey("decode-1", ME.epoch)),
        proven(message, me=WorkerKey(ME.worker_id, "9" * 16)),
        proven(message, key=b"another cluster's key"),
    ):
        bench = Bench()
        assert refused(bench, taken).code == "protocol_error"
        assert bench.role.active() == []


def test_offer_with_a_wrong_proof_changes_nothing_and_is_counted() -> None:
    bench, message = Bench(), start()
    bench.command(message)
    for proof in (bytes(16), b"x" * 16, start("other").proof):
        assert bench.hear(offer(5, message, proof=proof)) == []
    assert bench.role.load().stale_messages == 3
    assert bench.pool.num_free_blocks == 16
    assert [type(item) for item in bench.hear(offer(5, message))] == [Renewing, AcceptBlocks, Grant]


def test_offer_of_another_worker_with_the_right_proof_changes_nothing() -> None:
    """A ticket that was overheard is worth nothing to the worker that was not meant."""
    bench, message = Bench(), start()
    bench.command(message)
    assert bench.hear(offer(5, message), peer=OTHER_PEER) == []
    assert bench.role.load().stale_messages == 1
    assert [type(item) for item in bench.hear(offer(5, message))] == [Renewing, AcceptBlocks, Grant]


def test_ticket_is_used_once() -> None:
    bench, message = Bench(), start()
    bench.command(message)
    bench.hear(offer(5, message))
    bench.arrive(0, 1, 2, 3, 4)
    bench.hear(done())
    assert bench.hear(offer(5, message)) == [Ack(TICKET, 1)]  # our last word again, and nothing begins anew
    assert bench.command(message) == []
    assert "each ticket is used once" in refused(bench, start("second")).message
    assert bench.pool.num_free_blocks == 11
