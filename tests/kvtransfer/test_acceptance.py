"""Where a link may write, and where not any more."""

from __future__ import annotations

import pytest

from penstock.core.errors import ProtocolError
from penstock.core.ids import BlockId, Ticket
from penstock.kvtransfer.acceptance import Acceptances, Outcome, check_push, check_source_slots
from penstock.protocol.messages import Push

TICKET = Ticket(b"t" * 16)


def push(*ordinals: int, generation: int = 1, first_layer: int = 0, num_layers: int = 4) -> Push:
    return Push(
        ticket=TICKET,
        generation=generation,
        first_layer=first_layer,
        num_layers=num_layers,
        ordinals=list(ordinals),
        digests=[b"d" * 8] * len(ordinals),
        source_slots=list(ordinals),
    )


@pytest.fixture
def accepted() -> Acceptances:
    acceptances = Acceptances(num_layers=4)
    acceptances.accept(TICKET, 1, {2: BlockId(7), 3: BlockId(9)})
    return acceptances


def test_claim_names_the_blocks_and_the_last_ordinal_ends_the_ticket(accepted: Acceptances) -> None:
    assert accepted.claim(push(3)) == [9]
    assert accepted.finish(push(3)) == Outcome((3,))
    assert accepted.claim(push(2)) == [7]
    assert accepted.finish(push(2)) == Outcome((2,))
    assert len(accepted) == 0
    assert accepted.claim(push(2)) is None


def test_ordinal_arrives_when_all_its_layers_are_in(accepted: Acceptances) -> None:
    for first_layer, arrived in ((0, ()), (2, (2,))):
        part = push(2, first_layer=first_layer, num_layers=2)
        assert accepted.claim(part) == [7]
        assert accepted.finish(part) == Outcome(arrived)
    assert accepted.claim(push(2, num_layers=2)) is None


@pytest.mark.parametrize("wrong", [push(1), push(2, 4), push(2, generation=2), push(2, generation=0)])
def test_claim_outside_the_grant_is_refused_and_counted(accepted: Acceptances, wrong: Push) -> None:
    assert accepted.claim(wrong) is None
    assert accepted.refused == 1


def test_revoke_between_pushes_is_immediate_and_during_one_waits(accepted: Acceptances) -> None:
    accepted.claim(push(2))
    assert not accepted.revoke(TICKET)
    assert accepted.is_revoked(push(2))
    assert accepted.finish(push(2)) == Outcome(revoked=True)
    assert accepted.claim(push(3)) is None
    assert accepted.revoke(TICKET)
    assert accepted.revoke(Ticket(b"?" * 16))


def test_grant_of_nothing_leaves_nothing() -> None:
    acceptances = Acceptances(num_layers=4)
    acceptances.accept(TICKET, 1, {})
    assert len(acceptances) == 0


def test_pushes_no_honest_peer_sends_are_protocol_errors() -> None:
    check_push(push(0, 1), num_blocks=2, num_layers=4)
    for wrong in (push(), push(0, 0), push(0, 1, 2), push(0, first_layer=1), push(0, num_layers=0)):
        with pytest.raises(ProtocolError):
            check_push(wrong, num_blocks=2, num_layers=4)
    check_source_slots(push(0, 5), 6)
    with pytest.raises(ProtocolError, match="below 5"):
        check_source_slots(push(0, 5), 5)
