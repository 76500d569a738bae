"""The worker core: router epochs, wrong roles, draining, and the errors of a step."""

from __future__ import annotations

from collections import deque

import msgspec

from penstock.core.ids import AttemptKey, Ticket, WorkerKey
from penstock.core.tickets import TicketFacts, prove
from penstock.decode_node.role import DecodeRole
from penstock.engine.block_pool import BlockPool
from penstock.engine.interface import ScheduledSeq
from penstock.kvtransfer.destination import DestinationTable
from penstock.kvtransfer.effects import AcceptBlocks, MessageArrived, PeerUp, Revoked
from penstock.kvtransfer.source import PushSizes, SourceTable
from penstock.kvtransfer.transports.inproc import InprocMesh, InprocNetwork
from penstock.prefill_node.role import PrefillRole
from penstock.protocol.messages import (
    MAX_REQUESTS,
    Abort,
    AttemptFailed,
    ChoiceState,
    Drain,
    FromRouter,
    Offer,
    Output,
    PrefillEnded,
    Role,
    SetRole,
    StartDecode,
    StartPrefill,
    ToRouter,
    ToWorker,
    pack_ids,
)
from penstock.protocol.sampling import SamplingParams
from penstock.testing.clock import FakeClock
from penstock.testing.fake_engine import FakeEngine, expected_tokens
from penstock.worker.core import BecomeRole, CoreEffect, WorkerCore
from penstock.worker.process import hello_of
from penstock.worker.role import Tell
from penstock.worker.within_step import Item

PROMPT = [3, 4, 5, 6, 7]
PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


class Bench:
    """A decode worker whose engine refuses the requests named in `poison`."""

    def __init__(
        self, role: Role = "decode", poison: frozenset[str] = frozenset(), max_requests: int = MAX_REQUESTS
    ) -> None:
        engine = FakeEngine(fails=lambda entry: self.refuses(entry))
        pool = BlockPool(64, 4)
        me = WorkerKey("w", "0" * 16)
        destination = DestinationTable(5.0)
        roles = [DecodeRole(me, engine.spec, pool, destination, b"k" * 32, max_requests=max_requests)]
        self.core = WorkerCore(me, role, engine, pool, list(roles), FakeClock())
        self.poison, self.number = poison, 0

    def refuses(self, entry: ScheduledSeq) -> bool:
        return entry.seq.key.request_id in self.poison

    def command(self, body: ToWorker, epoch: str = "a" * 16) -> list[ToRouter]:
        self.number += 1
        return told(self.core.on_frame(FromRouter(epoch, self.number, body)))

    def run(self) -> list[ToRouter]:
        messages: list[ToRouter] = []
        while self.core.has_work():
            batch, effects = self.core.begin_step()
            messages += told(effects + self.core.end_step(batch, self.core.compute(batch)))
            self.core.check_invariants()
        return messages


def told(effects: list[CoreEffect]) -> list[ToRouter]:
    return [effect.message for effect in effects if isinstance(effect, Tell)]


def start(request_id: str) -> StartDecode:
    return StartDecode(request_id, 1, pack_ids(PROMPT), PARAMS, [ChoiceState(0)], 60.0)


def tokens_of(messages: list[ToRouter], request_id: str) -> list[int]:
    items = [item for m in messages if isinstance(m, Output) for item in m.items if item.request_id == request_id]
    return [token.token_id for item in items for token in item.tokens]


def test_hello_tells_how_many_attempts_the_worker_takes() -> None:
    core = Bench(max_requests=3).core
    mesh = InprocMesh(core.key, "decode", core.engine.spec.fingerprint, core.engine.memory, print, InprocNetwork())
    assert hello_of(core, mesh).max_requests == 3


def test_full_worker_takes_the_attempt_behind_an_abort_that_has_to_wait_for_the_step() -> None:
    bench = Bench(max_requests=1)
    bench.command(start("old"))
    batch, _ = bench.core.begin_step()
    bodies: list[ToWorker] = [Abort("old", 1), start("new")]
    waiting: deque[Item] = deque(FromRouter("a" * 16, 2 + i, body) for i, body in enumerate(bodies))
    assert list(bench.core.take_within_step(batch, waiting)) == []
    bench.core.end_step(batch, bench.core.compute(batch))
    heard = [message for body in bodies for message in bench.command(body)]
    assert [(m.request_id, m.code) for m in heard if isinstance(m, AttemptFailed)] == [("old", "cancelled")]
    assert bench.core.snapshot().active == (AttemptKey("new", 1),)


def test_step_that_one_request_breaks_ends_only_that_request() -> None:
    bench = Bench(poison=frozenset({"bad"}))
    for request_id in ("one", "bad", "two"):
        bench.command(start(request_id))
    messages = bench.run()
    failed = [m for m in messages if isinstance(m, AttemptFailed)]
    assert [(m.request_id, m.code) for m in failed] == [("bad", "internal_error")]
    expected = expected_tokens(PROMPT, PARAMS)[0]
    assert tokens_of(messages, "one") == tokens_of(messages, "two") == expected
    assert bench.core.pool.num_free_blocks == bench.core.pool.num_blocks


def test_new_router_epoch_voids_what_the_old_router_asked_for() -> None:
    bench = Bench()
    bench.command(start("old"))
    messages = bench.command(start("new"), epoch="b" * 16)
    assert [m.request_id for m in messages if isinstance(m, AttemptFailed)] == ["old"]
    assert [key.request_id for key in bench.core.snapshot().active] == ["new"]
    assert tokens_of(bench.run(), "new") == expected_tokens(PROMPT, PARAMS)[0]


def test_command_for_a_role_that_is_not_here_is_answered() -> None:
    prefill = StartPrefill("r", 1, b"t" * 16, pack_ids(PROMPT), PARAMS, "w", "0" * 16, 60.0)
    [ended] = Bench("decode").command(prefill)
    assert isinstance(ended, PrefillEnded)
    assert not ended.ok
    bench = Bench("prefill")
    bench.core.roles.clear()
    [failed] = bench.command(start("r"))
    assert isinstance(failed, AttemptFailed)
    assert failed.retriable


def test_drain_shows_in_the_snapshot_and_running_work_ends() -> None:
    bench = Bench()
    bench.command(start("r"))
    bench.command(Drain())
    assert bench.core.snapshot().state == "draining"
    assert tokens_of(bench.run(), "r") == expected_tokens(PROMPT, PARAMS)[0]
    assert bench.core.is_idle


def test_worker_is_not_idle_while_a_write_may_still_come() -> None:
    """The attempt has ended, its hand-off is being revoked: who drains waits for the link to confirm."""
    bench, source, ticket, me = Bench(), WorkerKey("p", "1" * 16), Ticket(b"t" * 16), WorkerKey("w", "0" * 16)
    facts = TicketFacts(ticket, source, me, AttemptKey("r", 1), pack_ids(PROMPT), 60.0)
    proof = prove(b"k" * 32, facts)
    bench.core.on_link(PeerUp(source, "inproc"))
    bench.command(
        msgspec.structs.replace(start("r"), ticket=ticket, prefill_worker="p", prefill_epoch="1" * 16, proof=proof)
    )
    offer = Offer(ticket=ticket, num_tokens=len(PROMPT), num_blocks=2, block_size=4, reached=2, proof=proof)
    effects = bench.core.on_link(MessageArrived(source, offer))
    assert any(isinstance(effect, AcceptBlocks) for effect in effects)
    [failed] = [m for m in bench.command(Abort("r", 1)) if isinstance(m, AttemptFailed)]
    assert failed.code == "cancelled"
    assert bench.core.snapshot().active == ()
    assert not bench.core.is_idle
    bench.core.on_link(Revoked(source, ticket))
    assert bench.core.is_idle


def test_role_is_hosted_before_it_is_told_and_running_work_ends() -> None:
    bench = Bench()
    peer = WorkerKey("d", "1" * 16)
    bench.core.on_link(PeerUp(peer, "inproc"))
    made: list[PrefillRole] = []

    def host(name: Role) -> PrefillRole:
        assert name == "prefill"
        engine, pool = bench.core.engine, bench.core.pool
        source = SourceTable(5.0, 5.0, PushSizes.of(2, 8))
        made.append(PrefillRole(bench.core.key, engine.spec, pool, source, b"k" * 32))
        return made[-1]

    bench.core._make_role = host
    bench.command(start("r"))
    assert bench.core.snapshot().role == "decode"
    effects = bench.core.on_frame(FromRouter("a" * 16, 9, SetRole("prefill")))
    assert effects == [BecomeRole("prefill")]
    assert bench.core.snapshot().role == "prefill"
    assert len(bench.core.roles) == 2
    assert tokens_of(bench.run(), "r") == expected_tokens(PROMPT, PARAMS)[0], "what runs goes on"
    assert made[0]._peers == {peer: "inproc"}, "it knows the links that were there before it"
    for role in ("both", "decode", "prefill"):
        bench.core.on_frame(FromRouter("a" * 16, 10, SetRole(role)))
        assert bench.core.snapshot().role == role
    assert len(made) == 1, "a role that is hosted is not made again"


def test_role_that_cannot_be_hosted_is_not_taken() -> None:
    bench = Bench()
    assert bench.core.on_frame(FromRouter("a" * 16, 1, SetRole("both"))) == []
    assert bench.core.snapshot().role == "decode"
