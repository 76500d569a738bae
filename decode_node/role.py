"""The decode role. Life of an attempt:

1. StartDecode arrives. With a ticket it is *receiving*: the hand-off is expected from one prefill worker. Without
one it is
   *waiting* at once: this worker prefills the prompt itself, chunk by chunk, beside its running sequences.
2. receiving: prefill offers → *offers* queue → granted when there is room (only blocks that are not in the prefix
cache here) →
   blocks arrive, digests verified → Ack; the first token of each choice comes with the hand-off.
3. waiting → running by admission (blocks for all tokens it has), oldest first over `waiting` and `offers` alike.
4. running: one token a step and sequence; its table grows block by block. When no block is left the youngest
running sequence
   is preempted: its blocks are parked in host memory, or given up and computed again, whichever is cheaper
   (preemption.py), and it goes back to `waiting` by its arrival. Freed blocks stay findable while they last.
5. each choice ends with a finish_reason in its last Tokens, or the whole attempt with AttemptFailed. Blocks are
freed once;
   those of a hand-off that is cut short are freed only when no write can reach them any more.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core.errors import DeadlineExceeded, NodeLost, Overloaded, ProtocolError, ServeError
from ..core.ids import MAIN_ROUTER, AttemptKey, BlockId, Ticket, WorkerKey
from ..core.recent import RecentSet
from ..core.tickets import TicketFacts, check_proof
from ..engine.block_pool import BlockPool
from ..engine.interface import EngineSpec, ScheduledSeq
from ..engine.parking import ParkingSpace
from ..engine.sequence import Sequence
from ..engine.speculation.interface import Speculation
from ..kvtransfer.destination import DestinationTable
from ..kvtransfer.effects import (
    Advanced,
    BlocksArrived,
    DestinationEffect,
    LinkEvent,
    MessageArrived,
    Offered,
    PeerLost,
    PeerUp,
    Received,
    ReceiveFailed,
    Revoke,
    Revoked,
)
from ..kvtransfer.ownership import Ownership
from ..protocol.messages import (
    MAX_REQUESTS,
    Abort,
    AttemptFailed,
    Done,
    Failed,
    Offer,
    Output,
    Reached,
    Renew,
    SampledToken,
    StartDecode,
    Tokens,
    ToWorker,
    WorkerLoad,
)
from ..worker.admission import release
from ..worker.role import Budget, Computed, Effect, Tell
from ..worker.routers import Tallies, blocks_to_go_on, tally_of
from ..worker.usage import prefill_phases
from .drafting import Drafting
from .finish import append
from .group import Group, GroupState, build_group
from .phases import StepClock, received_phases
from .preemption import Preemption
from .scheduler import DecodeScheduler

FINAL_CODES = frozenset({"bad_request", "cancelled", "deadline_exceeded"})  # another attempt would end the same way


class DecodeRole:
    """Continuous batching over received and locally prefilled sequences.

    `me` and `cluster_key`: tickets for other workers, or made without the key, are refused. `ownership`: takes blocks
    that peers give which keep theirs in the same memory.
    """

    hands_off = False

    def __init__(
        self,
        me: WorkerKey,
        spec: EngineSpec,
        pool: BlockPool,
        destination: DestinationTable,
        cluster_key: bytes,
        max_running: int = 64,
        max_requests: int = MAX_REQUESTS,
        parking: ParkingSpace | None = None,
        ownership: Ownership | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._me, self._cluster_key = me, cluster_key
        self._spec, self._pool, self._destination, self.max_requests = spec, pool, destination, max_requests
        self._ownership = ownership
        if ownership is not None:
            ownership.live = destination.live_generations
        self._preemption = Preemption(pool, parking)
        self._scheduler = DecodeScheduler(pool, max_running, self._preemption, Drafting(pool, speculation))
        self._steps = StepClock()
        self._groups: dict[AttemptKey, Group] = {}
        self._by_ticket: dict[Ticket, Group] = {}  # receiving, and cut short but not yet safe to free
        self._peers: set[WorkerKey] = set()
        self._recent = RecentSet[AttemptKey](4096)
        self._items: dict[str, list[Tokens]] = {}  # router → what its requests have drawn
        self._effects: list[Effect] = []
        self._stale = 0
        self._failed_handoffs = 0
        self._received_blocks = 0

    # ---- commands ----

    def on_command(self, message: ToWorker, now: float, router: str = MAIN_ROUTER) -> None:
        match message:
            case StartDecode(request_id=request_id, attempt=attempt):
                self._start(AttemptKey(request_id, attempt, router), message, now)
            case Abort(request_id=request_id, attempt=attempt, choice=None):
                self._abort(AttemptKey(request_id, attempt, router), now)
            case Abort(request_id=request_id, attempt=attempt, choice=int() as choice):
                self._abort_choice(AttemptKey(request_id, attempt, router), choice, now)
            case _:
                return

    def _start(self, key: AttemptKey, message: StartDecode, now: float) -> None:
        if not self._recent.add(key):
            self._stale += 1
            return
        try:
            if len(self._groups) >= self.max_requests:
                raise Overloaded(f"this worker holds {len(self._groups)} requests, its bound")
            group = build_group(key, message, self._spec, now)
            if group.source is not None and group.source not in self._peers:
                raise NodeLost(f"no link to prefill worker {group.source}")
            expected = self._expect(group, message, now)
        except ServeError as error:
            self._tell_failed(key, error.code, str(error), error.retriable or isinstance(error, Overloaded))
            return
        self._groups[key] = group
        if group.ticket is not None:
            self._by_ticket[group.ticket] = group
            self._take(expected, now)
        else:
            self._scheduler.add_waiting([group.lead] if group.lead.sample_choices else list(group.seqs.values()))

    def _expect(self, group: Group, message: StartDecode, now: float) -> list[DestinationEffect]:
        if group.ticket is None or group.source is None:
            return []
        tokens = message.prompt_ids + (message.choices[0].output_ids if message.params.n == 1 else b"")
        facts = TicketFacts(group.ticket, group.source, self._me, group.key, tokens, message.timeout_s)
        check_proof(self._cluster_key, facts, message.proof)
        return self._destination.expect(group.ticket, group.source, now, message.proof)

    def _tell_failed(self, key: AttemptKey, code: str, message: str, retriable: bool) -> None:
        failed = AttemptFailed(key.request_id, key.attempt, code, message[:1000], retriable)
        self._effects.append(Tell(failed, key.router))

    def _abort(self, key: AttemptKey, now: float) -> None:
        group = self._groups.get(key)
        if group is None:
            self._recent.add(key)  # an Abort that overtook its StartDecode must win
            return
        self._end(group, "cancelled", "the request was cancelled", now)

    def _abort_choice(self, key: AttemptKey, choice: int, now: float) -> None:
        group = self._groups.get(key)
        if group is None:
            return
        group.cancelled.add(choice)
        if group.state is GroupState.LIVE and not group.lead.sample_choices:
            # With its last choice the attempt ends without a word: it has not failed, the others have had theirs.
            self._drop(group, choice)
        elif all(c in group.cancelled for c in group.seqs):
            self._end(group, "cancelled", "the request was cancelled", now)

    # ---- the hand-off ----

    def on_link(self, event: LinkEvent, now: float) -> None:
        match event:
            case PeerUp(peer=peer):
                self._peers.add(peer)
            case PeerLost(peer=peer):
                self._peers.discard(peer)
                self._take(self._destination.peer_lost(peer, now), now)
            case MessageArrived(peer=peer, message=Offer() | Reached() | Done() | Failed() | Renew() as message):
                self._take(self._destination.on_message(peer, message, now), now)
            case BlocksArrived():
                self._take(self._destination.on_arrived(event, now), now)
            case Revoked():
                self._take(self._destination.on_revoked(event, now), now)
            case _:
                return

    def _take(self, effects: list[DestinationEffect], now: float) -> None:
        for effect in effects:
            match effect:
                case Offered():
                    self._scheduler.add_offer(effect, self._by_ticket[effect.ticket].lead)
                case Advanced(ticket=ticket, reached=reached):
                    self._scheduler.incoming.advance(ticket, reached)
                case Revoke(ticket=ticket):
                    self._scheduler.incoming.revoke(ticket)
                    self._effects.append(effect)
                case Received():
                    self._received(self._by_ticket.pop(effect.ticket), effect, now)
                case ReceiveFailed():
                    self._receive_failed(effect, now)
                    self._settle()
                case _:
                    self._effects.append(effect)
        self._grant_offers(now)

    def _grant_offers(self, now: float) -> None:
        for item, granting in self._scheduler.admit_offers():
            ticket = item.offer.ticket
            if granting is None:
                message = f"prefill offers {item.offer.num_tokens} tokens, this attempt has {item.lead.num_tokens}"
                self._take(self._destination.cancel(ticket, "protocol_error", message, now), now)
            else:
                if granting.stop == item.offer.num_blocks:
                    self._by_ticket[ticket].granted_at = now
                self._take(self._destination.grant(ticket, granting, now), now)

    def layers_computed(self, entries: list[ScheduledSeq], num_layers: int, now: float) -> None:
        """Nothing leaves from here."""

    def _received(self, group: Group, effect: Received, now: float) -> None:
        lead, done = group.lead, effect.done
        self._scheduler.end_receiving(lead)
        self._received_blocks += done.num_blocks
        objection = self._take_over(group, effect)
        if not objection and len(done.first_tokens) != len(lead.choices):
            objection = f"prefill sent {len(done.first_tokens)} first tokens for {len(lead.choices)} choices"
        if group.state is GroupState.ENDED or objection:
            release(lead, self._pool)
            if group.state is not GroupState.ENDED:
                self._end(group, "protocol_error", objection, now)
            return
        group.move(GroupState.LIVE)
        lead.num_computed_tokens = lead.num_tokens
        self._preemption.note_handoff(lead.num_tokens, done.phases, now)
        self._scheduler.join(lead)
        block_bytes = self._pool.block_size * self._spec.bytes_per_token
        group.phases = received_phases(lead, done, block_bytes, now, group.granted_at, len(effect.given))
        self._first_tokens(group, done.first_tokens, now)

    def _take_over(self, group: Group, effect: Received) -> str:
        """Blocks that prefill has given stand in for those granted, which are its own before it reads the Ack.

        Returns what is wrong with them; then none is taken.
        """
        if not effect.given or self._ownership is None or group.source is None:
            return ""
        source, generation = group.source.worker_id, effect.done.generation
        try:
            self._ownership.take_over(group.lead.block_table, effect.given, source, generation)
        except ProtocolError as error:
            return str(error)
        return ""

    def _settle(self) -> None:
        if self._ownership is not None:
            self._ownership.settle()

    def _receive_failed(self, effect: ReceiveFailed, now: float) -> None:
        group = self._by_ticket.pop(effect.ticket)
        self._failed_handoffs += 1
        self._scheduler.forget_offer(effect.ticket)
        self._scheduler.end_receiving(group.lead)
        release(group.lead, self._pool)
        if group.state is not GroupState.ENDED:
            self._end(group, effect.code, effect.message, now)

    # ---- steps ----

    def schedule(self, budget: Budget, now: float) -> list[ScheduledSeq]:
        self._steps.begin(now)
        self._expire(now)
        self._grant_offers(now)
        return self._scheduler.schedule(budget, now)

    def commit(self, computed: list[Computed], now: float) -> None:
        entries = [entry for entry, _ in computed]
        self._steps.end(computed, now)
        self._preemption.note_step(entries, self._steps.step_s, now)
        self._scheduler.drafting.note_step(entries, self._steps.step_s)
        for entry, tokens in computed:
            group = self._groups.get(entry.seq.key)
            if group is None or not self._scheduler.is_running(entry.seq):
                continue
            if tokens and not entry.seq.sample_choices:
                self._accept(group, entry.seq, tokens, now, entry)
                continue
            self._scheduler.advance(entry)
            if tokens:
                group.phases = prefill_phases(entry.seq, self._steps.step_s, now)
                self._first_tokens(group, tokens, now)
        self._flush()
        self._steps.forget()

    def _first_tokens(self, group: Group, tokens: tuple[SampledToken, ...], now: float) -> None:
        """The prompt is in the cache:

        the lead goes on as its own choice, the others fork off it through the prefix cache.
        """
        lead = group.lead
        choices, lead.sample_choices = lead.choices, ()
        seqs = dict(group.seqs)
        for choice, token in zip(choices, tokens, strict=True):
            if choice in group.cancelled:
                self._drop(group, choice)
            else:
                self._accept(group, seqs[choice], (token,), now)
        self._scheduler.add_forks([s for s in group.seqs.values() if s is not lead])
        self._flush()

    def _accept(
        self,
        group: Group,
        seq: Sequence,
        tokens: tuple[SampledToken, ...],
        now: float,
        entry: ScheduledSeq | None = None,
    ) -> None:
        """Append what `seq` has drawn, report it, and end the choice with its last token.

        `entry`: the step of its own that it was drawn in; all tokens but the last one were drafted there.
        """
        index = len(seq.output_ids)
        taken, reason, stop_token = append(seq, tokens, self._spec.eos_token_ids)
        drafted = accepted = 0
        if entry is not None:
            drafted, accepted = len(entry.draft), min(len(tokens) - 1, len(taken))
            self._scheduler.advance(entry, accepted)
        wait_s = self._steps.wait_s(seq, now)
        (request_id, attempt, router), phases = seq.key, group.phases
        self._items.setdefault(router, []).append(
            Tokens(request_id, attempt, seq.choice, index, taken, reason, stop_token, phases, drafted, accepted, wait_s)
        )
        group.phases = None
        if reason is not None:
            self._drop(group, seq.choice)

    def _drop(self, group: Group, choice: int) -> None:
        """Take one choice out; the attempt ends with its last."""
        seq = group.seqs.pop(choice, None)
        if seq is None:
            return
        self._scheduler.remove(seq)
        if not group.seqs and group.state is not GroupState.ENDED:
            group.move(GroupState.ENDED)
            del self._groups[group.key]

    def _end(self, group: Group, code: str, message: str, now: float) -> None:
        """End the attempt without an answer. The blocks of a hand-off follow when it lets go of them."""
        was_receiving = group.state is GroupState.RECEIVING
        group.move(GroupState.ENDED)
        del self._groups[group.key]
        self._tell_failed(group.key, code, message, retriable=code not in FINAL_CODES)
        if not was_receiving:
            for seq in group.seqs.values():
                self._scheduler.remove(seq)
        elif group.ticket is not None and group.ticket in self._by_ticket:
            self._take(self._destination.cancel(group.ticket, code, message, now), now)

    def fail_entry(self, entry: ScheduledSeq, error: ServeError, now: float) -> None:
        group = self._groups.get(entry.seq.key)
        if group is not None:
            self._end(group, error.code, str(error), now)

    def _expire(self, now: float) -> None:
        for group in [g for g in self._groups.values() if g.lead.deadline <= now]:
            self._end(group, DeadlineExceeded.code, "the deadline passed", now)

    def tick(self, now: float) -> None:
        self._expire(now)
        self._take(self._destination.tick(now), now)
        self._settle()

    def abort_all(self, now: float, router: str = MAIN_ROUTER) -> None:
        for group in [group for group in self._groups.values() if group.key.router == router]:
            self._end(group, "cancelled", "the router that asked for it is gone", now)

    def _flush(self) -> None:
        for router, items in self._items.items():
            self._effects.append(Tell(Output(items, self._steps.told()), router))
        self._items = {}

    # ---- views ----

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def has_work(self) -> bool:
        return self._scheduler.has_work()

    def active(self) -> list[AttemptKey]:
        return list(self._groups)

    def load(self) -> WorkerLoad:
        scheduler = self._scheduler
        given = self._ownership.num_taken if self._ownership is not None else 0
        drafts = scheduler.drafting.counts
        return WorkerLoad(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.offers),
            receiving=len(scheduler.receiving),
            queued_tokens=sum(s.num_uncomputed_tokens - s.num_parked_tokens for s in scheduler.waiting),
            preemptions=scheduler.num_preemptions,
            parked=self._preemption.num_parked,
            unparked=self._preemption.num_unparked,
            parked_bytes=self._preemption.parked_bytes,
            corrupt_parked_blocks=self._preemption.num_corrupt,
            prefix_hit_tokens=scheduler.hit_tokens,
            prefix_query_tokens=scheduler.queried_tokens,
            transferred_blocks=self._received_blocks,
            transferred_bytes=(self._received_blocks - given) * self._pool.block_size * self._spec.bytes_per_token,
            given_blocks=given,
            failed_handoffs=self._failed_handoffs,
            stale_messages=self._stale + self._destination.stale,
            drafts=drafts.drafts,
            drafted_tokens=drafts.drafted,
            accepted_tokens=drafts.accepted,
            accepted_at=drafts.positions,
        )

    def tally(self, tallies: Tallies) -> None:
        for group in self._groups.values():
            tally, seqs = tally_of(tallies, group.key.router), list(group.seqs.values())
            tally.attempts += 1
            tally.streams += len(seqs)
            tally.running += sum(bool(seq.output_ids) for seq in seqs)
            lengths = [seq.num_tokens for seq in seqs]
            tally.blocks += blocks_to_go_on(lengths, group.lead.num_prompt_tokens, self._pool.block_size)
            if group.ticket is None:
                tally.queued_tokens += sum(seq.num_uncomputed_tokens for seq in seqs if seq.is_prefilling)

    def owners(self) -> Iterable[list[BlockId]]:
        return self._scheduler.owners()

    def check_invariants(self) -> None:
        """Raise AssertionError where the scheduler's books do not balance. For tests and the simulation."""
        self._scheduler.check_invariants()
