"""The prefill role. Life of a prefill:

    1. waiting    StartPrefill arrived; FIFO, no blocks, no promise to decode yet
    2. computing  admitted: blocks for the whole prompt (its cached prefix reused), Offer sent; one chunk a step under
                  the token budget; blocks that decode has granted leave layer by layer within the step, or after it
    3. handing    last chunk computed, first token of every choice sampled, rest pushed, Done sent; blocks stay under
                  a lease
    4. ended      Ack, failure, abort, lost peer, lease or deadline: blocks freed once, PrefillEnded told once

Any failure after 1 tells decode through the hand-off (`Failed`) and the router through PrefillEnded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.errors import BadRequest, DeadlineExceeded, NodeLost, Overloaded, ProtocolError, ServeError
from ..core.ids import MAIN_ROUTER, AttemptKey, BlockId, Ticket, WorkerKey
from ..core.recent import RecentSet
from ..core.tickets import TicketFacts, check_proof
from ..engine.block_pool import BlockPool
from ..engine.interface import EngineSpec, ScheduledSeq
from ..engine.sequence import Sequence, blocks_for
from ..kvtransfer.effects import LinkEvent, MessageArrived, PeerLost, PeerUp, SendBlocks, SourceEffect, SourceEnded
from ..kvtransfer.ownership import TRANSPORT as OWNER
from ..kvtransfer.ownership import Candidates, Ownership
from ..kvtransfer.source import HandoffPlan, SourceTable
from ..protocol.messages import (
    MAX_REQUESTS,
    Abort,
    Ack,
    Cancel,
    Grant,
    PrefillEnded,
    Renew,
    SampledToken,
    StartPrefill,
    ToWorker,
    WorkerLoad,
    unpack_ids,
)
from ..worker.admission import cache_key, next_chunk, publish_computed, refuse, release, try_admit
from ..worker.role import Budget, Computed, Effect, Tell
from ..worker.routers import Tallies, tally_of
from ..worker.usage import note_chunks, prefill_phases


@dataclass(slots=True, eq=False)
class PrefillTask:
    """One prefill and the hand-off it feeds. `opened`: the hand-off exists in the source table."""

    seq: Sequence
    ticket: Ticket
    decode: WorkerKey
    proof: bytes
    opened: bool = False

    @property
    def is_resumption(self) -> bool:
        """It goes on behind tokens that a reader has."""
        return bool(self.seq.output_ids)


class PrefillRole:
    """Chunked prefill under a token budget, with a hand-off queue behind it. First come first served, but for streams
    that lost their worker: their readers wait in the middle of an answer, and most of their blocks are still cached.

    `me` and `cluster_key`: tickets for other workers, or made without the key, are refused. `ownership`: gives blocks
    to peers that keep theirs in the same memory. A gift is for good, so nothing leaves for them before all is computed.
    """

    hands_off = True

    def __init__(
        self,
        me: WorkerKey,
        spec: EngineSpec,
        pool: BlockPool,
        source: SourceTable,
        cluster_key: bytes,
        max_requests: int = MAX_REQUESTS,
        ownership: Ownership | None = None,
    ) -> None:
        self._me, self._cluster_key = me, cluster_key
        self._spec, self._pool, self._source, self.max_requests = spec, pool, source, max_requests
        self._tasks: dict[AttemptKey, PrefillTask] = {}
        self._by_ticket: dict[Ticket, PrefillTask] = {}
        self._waiting: deque[PrefillTask] = deque()
        self._computing: list[PrefillTask] = []
        self._ownership = ownership
        self._peers: dict[WorkerKey, str] = {}  # linked, by which transport
        self._recent = RecentSet[AttemptKey](4096)
        self._effects: list[Effect] = []
        self._stale = 0
        self._failed_handoffs = 0
        self._queried_tokens = 0
        self._hit_tokens = 0
        self._step_began = 0.0

    # ---- commands ----

    def on_command(self, message: ToWorker, now: float, router: str = MAIN_ROUTER) -> None:
        match message:
            case StartPrefill(request_id=request_id, attempt=attempt):
                self._start(AttemptKey(request_id, attempt, router), message, now)
            case Abort(request_id=request_id, attempt=attempt, choice=None):
                self._abort(AttemptKey(request_id, attempt, router), now)
            case _:
                return

    def _start(self, key: AttemptKey, message: StartPrefill, now: float) -> None:
        if not self._recent.add(key):
            self._stale += 1
            return
        try:
            task = self._task(key, message, now)
        except ServeError as error:
            self._tell_ended(key, error.code, str(error))
            return
        self._tasks[key] = self._by_ticket[task.ticket] = task
        self._enqueue(task)

    def _enqueue(self, task: PrefillTask) -> None:
        """Resumptions stand before all others, in order of arrival like these."""
        place = sum(other.is_resumption for other in self._waiting) if task.is_resumption else len(self._waiting)
        self._waiting.insert(place, task)

    def _task(self, key: AttemptKey, message: StartPrefill, now: float) -> PrefillTask:
        prompt_ids, output_ids = unpack_ids(message.prompt_ids), unpack_ids(message.output_ids)
        reason = refuse(prompt_ids, output_ids, message.params, self._spec)
        decode = WorkerKey(message.decode_worker, message.decode_epoch)
        if reason is not None:
            raise BadRequest(reason)
        if len(self._waiting) >= self.max_requests:
            raise Overloaded(f"the prefill queue holds {len(self._waiting)} requests, its bound")
        if decode not in self._peers:
            raise NodeLost(f"no link to decode worker {decode}")
        if Ticket(message.ticket) in self._by_ticket:
            raise ProtocolError("the ticket is in use")
        check_proof(self._cluster_key, self._facts(key, message, decode), message.proof)
        seq = Sequence(
            key,
            0,
            prompt_ids,
            message.params,
            cache_key(message.cache_salt, self._spec.fingerprint),
            now,
            now + message.timeout_s,
            output_ids,
        )
        seq.sample_choices = tuple(range(message.params.n)) if not output_ids else ()
        return PrefillTask(seq, Ticket(message.ticket), decode, message.proof)

    def _facts(self, key: AttemptKey, message: StartPrefill, decode: WorkerKey) -> TicketFacts:
        tokens = message.prompt_ids + message.output_ids
        return TicketFacts(Ticket(message.ticket), self._me, decode, key, tokens, message.timeout_s)

    def _abort(self, key: AttemptKey, now: float) -> None:
        task = self._tasks.get(key)
        if task is None:
            self._recent.add(key)  # an Abort that overtook its StartPrefill must win
            return
        self._fail(task, "cancelled", "the request was cancelled", now)

    # ---- the hand-off ----

    def on_link(self, event: LinkEvent, now: float) -> None:
        match event:
            case PeerUp(peer=peer, transport=transport):
                self._peers[peer] = transport
            case PeerLost(peer=peer):
                self._peers.pop(peer, None)
                self._take(self._source.peer_lost(peer, now))
                for task in [t for t in self._waiting if t.decode == peer]:
                    self._fail(task, NodeLost.code, f"decode worker {peer} is gone: {event.reason}", now)
            case MessageArrived(peer=peer, message=Grant() | Ack() | Cancel() | Renew() as message):
                self._take(self._source.on_message(peer, message, now))
            case _:
                return

    def _take(self, effects: list[SourceEffect]) -> None:
        for effect in effects:
            if isinstance(effect, SourceEnded):
                self._end(self._by_ticket[effect.ticket], effect.code, effect.message)
                self._settle()
                continue
            if isinstance(effect, SendBlocks):
                self._give(effect)
            self._effects.append(effect)

    def _gives_to(self, peer: WorkerKey) -> bool:
        return self._ownership is not None and self._peers.get(peer) == OWNER

    def _give(self, effect: SendBlocks) -> None:
        """What of these blocks need not stay becomes the peer's, before the push that says so is on its way."""
        is_whole = effect.num_layers == self._spec.fingerprint.num_layers
        if self._ownership is None or not is_whole or not self._gives_to(effect.peer):
            return
        seq, first, size = self._by_ticket[effect.ticket].seq, effect.ordinals[0], self._pool.block_size
        hashes = seq.hashes(size)[first : first + len(effect.block_ids)]
        candidates = Candidates(effect.block_ids, hashes, max(0, seq.num_cached_tokens // size - first))
        gone = self._ownership.hand_over(candidates, effect.peer.worker_id, effect.generation)
        seq.block_table = [block_id for block_id in seq.block_table if block_id not in gone]

    def _settle(self) -> None:
        if self._ownership is not None:
            self._ownership.settle()

    def _fail(self, task: PrefillTask, code: str, message: str, now: float) -> None:
        if task.opened:
            self._take(self._source.fail(task.ticket, code, message, now))
        else:
            self._end(task, code, message)

    def _end(self, task: PrefillTask, code: str, message: str) -> None:
        """The one way out of this role."""
        del self._tasks[task.seq.key], self._by_ticket[task.ticket]
        if task in self._waiting:
            self._waiting.remove(task)
        if task in self._computing:
            self._computing.remove(task)
        release(task.seq, self._pool)
        self._failed_handoffs += bool(code)
        self._tell_ended(task.seq.key, code, message)

    def _tell_ended(self, key: AttemptKey, code: str, message: str) -> None:
        self._effects.append(
            Tell(PrefillEnded(key.request_id, key.attempt, not code, code, message[:1000]), key.router)
        )

    # ---- steps ----

    def schedule(self, budget: Budget, now: float) -> list[ScheduledSeq]:
        """A step of resumptions, if there are any, else one of other prompts: these would only make it longer."""
        self._step_began = now
        self._expire(now)
        return self._schedule(budget, now, is_resumption=True) or self._schedule(budget, now, is_resumption=False)

    def _schedule(self, budget: Budget, now: float, *, is_resumption: bool) -> list[ScheduledSeq]:
        begun = [task for task in self._computing if task.is_resumption is is_resumption]
        entries = [self._chunk(task, budget, now) for task in begun]
        while self._may_begin(budget, is_resumption) and self._admit(self._waiting[0]):
            entries.append(self._chunk(self._computing[-1], budget, now))
        return [entry for entry in entries if entry is not None]

    def _may_begin(self, budget: Budget, is_resumption: bool) -> bool:
        has_budget = budget.num_tokens > 0 and budget.num_seqs > 0
        return has_budget and bool(self._waiting) and self._waiting[0].is_resumption is is_resumption

    def _chunk(self, task: PrefillTask, budget: Budget, now: float) -> ScheduledSeq | None:
        """The next chunk of `task`; decode hears how far it reaches before it is computed."""
        entry = next_chunk(task.seq, budget, now)
        if entry is None:
            return None
        reached = len(self._table_after(entry))
        if task.opened:
            self._take(self._source.reach(task.ticket, reached, now))
        else:
            task.opened = True
            self._take(self._source.open(task.ticket, task.decode, self._plan(task, reached), now))
        return entry

    def _table_after(self, entry: ScheduledSeq) -> list[BlockId]:
        """The blocks that are complete once this entry is computed."""
        seq = entry.seq
        num_computed = seq.num_computed_tokens + entry.num_new_tokens
        return seq.block_table if entry.sample else seq.block_table[: num_computed // self._pool.block_size]

    def _plan(self, task: PrefillTask, reached: int) -> HandoffPlan:
        num_tokens, block_size = task.seq.num_tokens, self._pool.block_size
        return HandoffPlan(num_tokens, blocks_for(num_tokens, block_size), block_size, reached, task.proof)

    def _admit(self, task: PrefillTask) -> bool:
        seq = task.seq
        held = try_admit(seq, self._pool, reserve=0)
        if held is None:
            return False
        self._waiting.popleft()
        self._computing.append(task)
        self._queried_tokens += seq.num_tokens
        self._hit_tokens += seq.num_cached_tokens
        return True

    def layers_computed(self, entries: list[ScheduledSeq], num_layers: int, now: float) -> None:
        for entry in entries:
            task = self._tasks.get(entry.seq.key)
            if task is not None and task.seq is entry.seq and not self._gives_to(task.decode):
                table = self._table_after(entry)
                self._take(self._source.layers_computed(task.ticket, table, num_layers, now))

    def commit(self, computed: list[Computed], now: float) -> None:
        note_chunks(computed, now - self._step_began)
        for entry, tokens in computed:
            task = self._tasks.get(entry.seq.key)
            if task is not None and task.seq is entry.seq:
                self._advance(task, entry, tokens, now)

    def _advance(self, task: PrefillTask, entry: ScheduledSeq, tokens: tuple[SampledToken, ...], now: float) -> None:
        seq, sampled = task.seq, entry.sample
        seq.num_computed_tokens += entry.num_new_tokens
        publish_computed(seq, self._pool)
        if not sampled:
            num_full = seq.num_computed_tokens // self._pool.block_size
            if not self._gives_to(task.decode):
                self._take(self._source.blocks_ready(task.ticket, seq.block_table[:num_full], now))
            return
        self._computing.remove(task)
        phases = prefill_phases(seq, now - self._step_began, now)
        self._take(self._source.seal(task.ticket, seq.block_table, tokens, phases, now))

    def fail_entry(self, entry: ScheduledSeq, error: ServeError, now: float) -> None:
        task = self._tasks.get(entry.seq.key)
        if task is not None and task.seq is entry.seq:
            self._fail(task, error.code, str(error), now)

    def _expire(self, now: float) -> None:
        for task in [t for t in self._tasks.values() if t.seq.deadline <= now]:
            self._fail(task, DeadlineExceeded.code, "the deadline passed during prefill", now)

    def tick(self, now: float) -> None:
        self._expire(now)
        self._take(self._source.tick(now))
        self._settle()

    def abort_all(self, now: float, router: str = MAIN_ROUTER) -> None:
        for task in [task for task in self._tasks.values() if task.seq.key.router == router]:
            self._fail(task, "cancelled", "the router that asked for it is gone", now)

    # ---- views ----

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def has_work(self) -> bool:
        return bool(self._computing or self._waiting)

    def active(self) -> list[AttemptKey]:
        return list(self._tasks)

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            running=len(self._computing),
            waiting=len(self._waiting),
            handing_off=len(self._tasks) - len(self._computing) - len(self._waiting),
            queued_tokens=sum(t.seq.num_uncomputed_tokens for t in (*self._waiting, *self._computing)),
            prefix_hit_tokens=self._hit_tokens,
            prefix_query_tokens=self._queried_tokens,
            failed_handoffs=self._failed_handoffs,
            stale_messages=self._stale + self._source.stale,
        )

    def tally(self, tallies: Tallies) -> None:
        """Prompts take a place and the time to compute them. Their blocks are not what decoding needs room for."""
        for task in self._tasks.values():
            tally = tally_of(tallies, task.seq.key.router)
            tally.attempts += 1
            tally.queued_tokens += task.seq.num_uncomputed_tokens

    def owners(self) -> Iterable[list[BlockId]]:
        return [t.seq.block_table for t in self._tasks.values() if t.seq.block_table]
