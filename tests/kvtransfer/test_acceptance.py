"""Where a link may write, and where not any more."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.core.errors import ProtocolError
from penstock.core.ids import BlockId, Ticket, WorkerKey
from penstock.kvtransfer.acceptance import Acceptances, Claim, Outcome, check_push
from penstock.kvtransfer.digest import combined_digest
from penstock.kvtransfer.effects import AcceptBlocks
from penstock.protocol.messages import Push

TICKET, PEER = Ticket(b"t" * 16), WorkerKey("prefill-0", "a" * 16)
TABLE = tuple(map(BlockId, (11, 12, 7, 9)))
NUM_LAYERS = 4


def push(*ordinals: int, generation: int = 1, first_layer: int = 0, num_layers: int = NUM_LAYERS) -> Push:
    digests = [bytes([ordinal, first_layer, num_layers]) + bytes(5) for ordinal in ordinals]
    return Push(
        ticket=TICKET,
        generation=generation,
        first_layer=first_layer,
        num_layers=num_layers,
        ordinals=list(ordinals),
        digests=b"".join(digests),
        source_slots=list(ordinals),
    )


def granted(first: int, stop: int, table: tuple[BlockId, ...] = TABLE, generation: int = 1) -> AcceptBlocks:
    return AcceptBlocks(PEER, TICKET, generation, first, stop, table, num_tokens=15)


def digest_of(*pushes: Push) -> bytes:
    """What Done must say of an ordinal that came alone in these pushes."""
    return combined_digest((part.first_layer, part.num_layers, part.digests) for part in pushes)


@pytest.fixture
def accepted() -> Acceptances:
    acceptances = Acceptances(NUM_LAYERS)
    acceptances.accept(granted(2, 4))
    return acceptances


def test_claim_names_the_table_and_the_last_ordinal_ends_the_ticket(accepted: Acceptances) -> None:
    assert accepted.claim(push(3)) == Claim(TABLE, 15)
    assert accepted.finish(push(3)) == Outcome((3,), (digest_of(push(3)),))
    assert accepted.claim(push(2)) == Claim(TABLE, 15)
    assert accepted.finish(push(2)) == Outcome((2,), (digest_of(push(2)),))
    assert len(accepted) == 0
    assert accepted.claim(push(2)) is None


def test_ordinal_arrives_when_all_its_layers_are_in(accepted: Acceptances) -> None:
    parts = [push(2, first_layer=0, num_layers=2), push(2, first_layer=2, num_layers=2)]
    for part, outcome in zip(parts, (Outcome(), Outcome((2,), (digest_of(*parts),))), strict=True):
        assert accepted.claim(part) is not None
        assert accepted.finish(part) == outcome
    assert accepted.claim(push(2, num_layers=2)) is None


def test_layer_that_is_here_is_not_written_again(accepted: Acceptances) -> None:
    accepted.claim(push(2, num_layers=2))
    accepted.finish(push(2, num_layers=2))
    for again in (push(2), push(2, num_layers=1), push(2, first_layer=1, num_layers=2), push(3, 2, num_layers=2)):
        assert accepted.claim(again) is None
    assert accepted.refused == 4
    assert accepted.claim(push(2, first_layer=2, num_layers=2)) is not None


def test_second_push_of_a_ticket_while_one_is_written_is_refused(accepted: Acceptances) -> None:
    accepted.claim(push(2))
    assert accepted.claim(push(3)) is None
    assert accepted.refused == 1


@pytest.mark.parametrize("wrong", [push(1), push(2, 4), push(2, generation=2), push(2, generation=0)])
def test_claim_outside_the_grant_is_refused_and_counted(accepted: Acceptances, wrong: Push) -> None:
    assert accepted.claim(wrong) is None
    assert accepted.refused == 1


def test_later_grant_opens_the_ordinals_behind_and_keeps_what_came(accepted: Acceptances) -> None:
    accepted.claim(push(2, num_layers=2))
    accepted.finish(push(2, num_layers=2))
    longer = (*TABLE, BlockId(30), BlockId(31))
    assert accepted.claim(push(4)) is None
    accepted.accept(granted(4, 6, longer))
    assert accepted.claim(push(4, 5)) == Claim(longer, 15)
    assert accepted.finish(push(4, 5)).arrived == (4, 5)
    assert accepted.claim(push(2, num_layers=2)) is None
    rest = push(2, first_layer=2, num_layers=2)
    assert accepted.claim(rest) is not None
    assert accepted.finish(rest) == Outcome((2,), (digest_of(push(2, num_layers=2), rest),))
    assert len(accepted) == 1


def test_later_grant_after_everything_came_opens_the_ticket_again(accepted: Acceptances) -> None:
    accepted.claim(push(2, 3))
    accepted.finish(push(2, 3))
    assert len(accepted) == 0
    accepted.accept(granted(4, 5, (*TABLE, BlockId(30))))
    assert accepted.claim(push(3)) is None
    assert accepted.claim(push(4)) is not None


def test_grant_of_another_generation_forgets_the_older_one(accepted: Acceptances) -> None:
    accepted.accept(granted(3, 4, generation=2))
    assert accepted.claim(push(3)) is None
    assert accepted.claim(push(2, generation=2)) is None
    assert accepted.claim(push(3, generation=2)) is not None


def test_revoke_between_pushes_is_immediate_and_during_one_waits(accepted: Acceptances) -> None:
    accepted.claim(push(2))
    assert accepted.is_wanted(push(2))
    assert not accepted.revoke(TICKET)
    assert not accepted.is_wanted(push(2))
    assert accepted.finish(push(2)) == Outcome(revoked=True)
    assert accepted.claim(push(3)) is None
    assert accepted.revoke(TICKET)
    assert accepted.revoke(Ticket(b"?" * 16))


def test_grant_of_nothing_leaves_nothing() -> None:
    acceptances = Acceptances(NUM_LAYERS)
    acceptances.accept(granted(2, 2))
    assert len(acceptances) == 0


def test_random_pushes_bring_each_layer_of_each_granted_ordinal_once() -> None:
    """Whatever is pushed, in whatever order: a claim is given exactly for layers that are open and not here yet."""
    rng = random.Random(6)
    for _ in range(100):
        acceptances, stop = Acceptances(NUM_LAYERS), 0
        table = tuple(map(BlockId, range(20, 26)))
        here: set[tuple[int, int]] = set()
        arrived: list[int] = []
        for _ in range(60):
            if stop < 6 and rng.random() < 0.2:
                first, stop = stop, rng.randint(stop + 1, 6)
                acceptances.accept(granted(first, stop, table))
            first = rng.randrange(NUM_LAYERS)
            part = push(
                *rng.sample(range(6), rng.randint(1, 3)),
                first_layer=first,
                num_layers=rng.randint(1, NUM_LAYERS - first),
            )
            layers = range(part.first_layer, part.first_layer + part.num_layers)
            wanted = {(ordinal, layer) for ordinal in part.ordinals for layer in layers}
            is_open = all(ordinal < stop for ordinal in part.ordinals) and wanted.isdisjoint(here)
            assert (acceptances.claim(part) is not None) == is_open
            if is_open:
                here |= wanted
                arrived += acceptances.finish(part).arrived
        complete = {ordinal for ordinal in range(6) if all((ordinal, layer) in here for layer in range(NUM_LAYERS))}
        assert sorted(arrived) == sorted(complete)


def test_pushes_no_honest_peer_sends_are_protocol_errors() -> None:
    check_push(push(0, 1), num_source_blocks=2, num_layers=4)
    fields = {name: getattr(push(0, 1), name) for name in Push.__struct_fields__}

    def changed(**changes: Any) -> Push:
        return Push(**(fields | changes))

    wrong = [
        push(),
        push(0, 0),
        push(0, 1, 2),
        push(0, first_layer=1),
        push(0, num_layers=0),
        changed(digests=b"d" * 15),
        changed(digests=b"d" * 24),
        changed(source_slots=[0]),
        changed(source_slots=[0, 2]),
    ]
    for bad in wrong:
        with pytest.raises(ProtocolError):
            check_push(bad, num_source_blocks=2, num_layers=4)
    check_push(changed(source_slots=[], staged=4096), num_source_blocks=2, num_layers=4)
