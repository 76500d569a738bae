"""What happens to requests: placed, dispatched, delivered, retried, ended. Effects collect here until the core hands
them out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..core.clock import Clock
from ..core.errors import DeadlineExceeded, NodeLost, ProtocolError, ServeError, Unavailable
from ..core.ids import AttemptKey, IdSource, WorkerKey, new_ticket
from ..protocol.messages import StepTime, Tokens
from .accounts import Accounts
from .admission import Door
from .blame import Blame
from .commands import proof_of, start_decode, start_prefill
from .config import RouterConfig, RouterCounters
from .effects import Deliver, Effect, End
from .fair_queue import Turn
from .interface import Decision, EndEvent, GenerateRequest, TokensEvent
from .learning import Learner
from .offered import OfferedLoad
from .options import Chooser
from .placement import Placement, Placer, Refusal
from .registry import Registry, WorkerRecord
from .request_table import RequestTable
from .requests import Attempt, Choice, RequestRecord, State, Verdict
from .timers import Timers

MAX_BACKOFF_S = 1.0
MIN_TIMEOUT_S = 0.001
MAX_BYPASSED = 16  # requests that go before one that finds no room; then the workers have to empty for it
MAX_TRIED = 8  # flows in a row that find no room

log = logging.getLogger(__name__)


class Lifecycle:
    """The one place where a request changes state. `now` is the time of the event being handled."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        ids: IdSource,
        router_epoch: str,
        registry: Registry,
        timers: Timers[str | WorkerKey],
        cluster_key: bytes,
        chooser: Chooser | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._ids = ids
        self._registry = registry
        self._timers = timers
        self._cluster_key = cluster_key
        self.table = RequestTable()
        self.placer = Placer(config, registry, ids.token(16).hex(), chooser, cluster_key)
        self.door = Door(config, registry, self.placer, self.table)
        self.offered = OfferedLoad()
        self.learner = Learner(self.placer.model, self.placer.streams, registry, self.offered)
        self.counters = RouterCounters()
        self.blame = Blame(self.placer.breakers, self.counters, clock.now())
        self.effects: list[Effect] = []
        self.books = Accounts(config, clock, router_epoch, registry, self.table, self.effects)
        self.has_news = False  # something happened that may let a waiting request go
        self.on_canary: Callable[[RequestRecord, ServeError | None], None] = lambda record, error: None
        self.num_canaries = 0  # under way

    # ---- placing

    def place_waiting(self) -> None:
        """Dispatch waiting requests in their turn, until the workers have enough or nobody finds room."""
        if not self.has_news:
            return
        self.has_news = False
        now = self._clock.now()
        without_room: list[RequestRecord] = []

        def take(record: RequestRecord) -> Turn:
            turn = self._try(record, now)
            if turn is Turn.TAKEN:
                for other in without_room:
                    other.bypassed += 1
            elif turn is Turn.BLOCKED:
                without_room.append(record)
                is_over = record.bypassed >= MAX_BYPASSED or len(without_room) >= MAX_TRIED
                return Turn.OVER if is_over else turn
            return turn

        self.table.offer(take)

    def _try(self, record: RequestRecord, now: float) -> Turn:
        if record.not_before > now or record.deadline <= now:
            return Turn.SKIPPED
        if self.door.is_shared and not record.num_attempts and self.placer.is_supplied(record, now):
            return Turn.OVER  # it waits here, where others may still go before it
        placement = self.placer.place(record, now)
        if isinstance(placement, Placement):
            self._dispatch(record, placement, now)
            return Turn.TAKEN
        return Turn.BLOCKED if placement is Refusal.NO_ROOM else Turn.SKIPPED

    def send_canary(self, request: GenerateRequest, placement: Placement, now: float) -> None:
        """A request of the router's own, to these workers and no others; `on_canary` hears of its end."""
        record = self.table.add(request, now)
        record.is_canary = True
        self.num_canaries += 1
        self._dispatch(record, placement, now)

    def _dispatch(self, record: RequestRecord, placement: Placement, now: float) -> None:
        decode, prefill = placement.decode, placement.prefill
        attempt = Attempt(
            key=AttemptKey(record.request_id, record.attempt_number + 1),
            decode=decode.key,
            prefill=prefill.key if prefill else None,
            ticket=new_ticket(self._ids) if prefill else None,
            sent_at=now,
            blocks=record.blocks(decode.block_size),
            queued_tokens=placement.uncached_tokens,
            streams=len(record.open_choices),
        )
        record.decision = self._decision(record, placement, now)
        record.to_dispatched(attempt, now)
        for worker in (decode, prefill):
            if worker is not None:
                worker.attempts[attempt.key] = None
        decode.used_blocks += attempt.blocks
        decode.num_streams += attempt.streams
        (prefill or decode).queued_tokens += attempt.queued_tokens
        (prefill or decode).prompts.add(attempt.key, placement.forecast.prefill_s, now)
        timeout_s = max(MIN_TIMEOUT_S, record.deadline - now)
        proof = proof_of(self._cluster_key, record, attempt, timeout_s)
        attempt.decode_number = self.books.send(decode, start_decode(record, attempt, timeout_s, proof))
        if prefill is not None:
            attempt.prefill_number = self.books.send(prefill, start_prefill(record, attempt, timeout_s, proof))
        self.placer.note_dispatch(record, placement)
        self.blame.note_attempt(attempt, now)
        if not record.is_canary:
            self.counters.attempts += 1
            self.counters.remote_prefills += prefill is not None
            self.counters.local_prefills += prefill is None
        self.arm(record)
        log.debug("request %s: decode %s, prefill %s", attempt.key, decode.key, attempt.prefill or "local")

    def _decision(self, record: RequestRecord, placement: Placement, now: float) -> Decision:
        """What the caller may see of it."""
        expected = placement.forecast
        return Decision(
            self._config.policy,
            placement.decode.key.worker_id,
            placement.prefill.key.worker_id if placement.prefill else None,
            now - record.submitted_at + expected.ttft_s,
            expected.tpot_s,
            expected.wait_s,
            expected.prefill_s,
            expected.transfer_s,
            record.promise.flow.class_name,
        )

    # ---- tokens

    def on_tokens(self, record: RequestRecord, item: Tokens, step: StepTime | None = None) -> None:
        """A Tokens message from the decode worker of the current attempt, and the step that drew them."""
        choice = record.choice(item.choice)
        if choice is None:
            n = record.request.params.n
            self.break_stream(record, f"tokens for choice {item.choice} of a request with n={n}")
            return
        if choice.is_finished:
            self._after_finish(record, choice)
            return
        verdict, skip = choice.judge(item, record.request.params.max_tokens)
        if verdict is Verdict.BROKEN:
            have, got = len(choice.output_ids), len(item.tokens)
            self.break_stream(record, f"choice {item.choice}: expected token {have}, got {got} from {item.index} on")
        elif verdict is Verdict.DUPLICATE:
            self.counters.duplicate_tokens += 1
        else:
            self.counters.duplicate_tokens += skip > 0
            self._accept(record, choice, item, skip, step)

    def _accept(self, record: RequestRecord, choice: Choice, item: Tokens, skip: int, step: StepTime | None) -> None:
        attempt = record.attempt
        assert attempt is not None
        if record.state is State.DISPATCHED:
            self.counters.resumed += record.num_output_tokens > 0
            record.to_running()
            self.books.prompt_computed(attempt)
            self._note_first(record, attempt, item)
            self.books.count_running(attempt, attempt.streams)
            if attempt.prefill is not None:
                self.placer.note_arrival(record, attempt.decode)
        elif attempt.pace is not None:
            attempt.pace.num_tokens += len(item.tokens) - skip
            self.arm(record)
        attempt.has_progress = True
        tokens = item.tokens[skip:]
        phases = None if record.has_phases else item.phases
        record.has_phases = record.has_phases or phases is not None
        event = TokensEvent(
            choice.number,
            len(choice.output_ids),
            tokens,
            item.finish_reason,
            item.stop_token,
            phases,
            item.drafted,
            item.accepted,
            record.routing(self._clock.now()) if phases is not None else None,
            item.wait_s,
            step,
            record.decision if phases is not None else None,
        )
        choice.output_ids.extend(token.token_id for token in tokens)
        choice.is_finished = item.finish_reason is not None
        if choice.is_finished:
            self._note_answer(record, choice, is_computed=item.stop_token is not None)
        self._deliver(record, event)
        self.books.reweigh(record, attempt)
        if choice.is_finished and not record.open_choices:
            attempt.is_decode_over = attempt.is_prefill_over = True
            if not record.is_canary:
                self.learner.answered(record, attempt, self._clock.now())
            self.end(record, None)

    def _note_first(self, record: RequestRecord, attempt: Attempt, item: Tokens) -> None:
        """Both legs of the attempt have worked."""
        now = self._clock.now()
        self.blame.note_success(attempt)
        for key in attempt.workers:
            worker = self._registry.find(key)
            if worker is not None:
                self.placer.evidence.note_success(worker, now)
        if record.is_canary:
            return
        self.learner.first_token(record, attempt, item.phases, now)
        if not record.num_output_tokens:
            record.first_token_at = now
            self.door.first_token(record)

    def _after_finish(self, record: RequestRecord, choice: Choice) -> None:
        """Tokens of a finished choice. One the caller cancelled goes on until its Abort has arrived: say it again if
        need be.
        """
        assert record.attempt is not None
        if choice.is_cancelled:
            self.counters.stale_messages += 1
            self.books.abort(record.attempt.decode, record.attempt.key, choice.number)
        else:
            self.counters.duplicate_tokens += 1

    def break_stream(self, record: RequestRecord, what: str) -> None:
        """What the decode worker says cannot follow what it has said: something is lost, and costs the attempt."""
        assert record.attempt is not None
        decode = record.attempt.decode
        self.counters.broken_streams += 1
        log.warning("request %s: worker %s: %s", record.attempt.key, decode, what)
        self.fail_attempt(record, ProtocolError(f"worker {decode.worker_id}: {what}"), (decode,))

    # ---- ends of attempts and requests

    def move_away(self, worker: WorkerRecord, error: ServeError) -> None:
        """Nothing that runs on `worker` goes on there."""
        for attempt in list(worker.attempts):
            record = self.books.current(attempt)
            if record is not None:
                self._lose_side(record, worker, error)

    def _lose_side(self, record: RequestRecord, lost: WorkerRecord, error: ServeError) -> None:
        """One worker of an attempt is gone: fatal for it, unless that was the prefill side and its work was done."""
        attempt = record.attempt
        assert attempt is not None
        if lost.key == attempt.decode or record.state is State.DISPATCHED:
            self.fail_attempt(record, error, (lost.key,))
            return
        self.prefill_over(record, attempt)
        lost.attempts.pop(attempt.key, None)

    def fail_attempt(self, record: RequestRecord, error: ServeError, blamed: tuple[WorkerKey, ...]) -> None:
        """Give the attempt up and try again, or end the request with `error` when that has failed too often."""
        now = self._clock.now()
        assert record.attempt is not None
        self.blame.note_failure(record.attempt, error, blamed, now)
        self.books.release(record)
        record.to_waiting(error, blamed, now + self._config.unavailable_s)
        self.table.enqueue(record)
        self._finish_full(record)
        if record.open_choices and record.fruitless < self._config.max_attempts and not record.is_canary:
            record.not_before = now + max(self._backoff(record.fruitless), self.blame.retry_wait_s(error, now))
            self.counters.retries += 1
            self.has_news = True
            self.arm(record)
            log.debug("request %s: attempt %d failed: %s", record.request_id, record.attempt_number, error)
        else:
            self.end(record, error if record.open_choices else None)

    def end(self, record: RequestRecord, error: ServeError | None) -> None:
        """The one terminal event of a request."""
        if record.state is State.WAITING:
            self.table.leave(record)
        for choice in record.open_choices:
            self._note_answer(record, choice)
        self.books.release(record)
        record.to_ended()
        self.door.end(record, self._clock.now(), is_whole=error is None)
        self.table.end(record, self._clock.now())
        self._timers.disarm(record.request_id)
        self.has_news = True
        if record.is_canary:
            self.num_canaries -= 1
            self.on_canary(record, error)
            return
        self.effects.append(
            End(record.request_id, EndEvent(error, record.num_attempts, record.route_s, record.num_resumed))
        )
        self.counters.ended += 1
        log.debug("request %s: ended: %s", record.request_id, error or "ok")

    def cancel_choice(self, record: RequestRecord, choice: Choice) -> None:
        """The caller has enough of this choice."""
        if choice.is_finished:
            return
        self._note_answer(record, choice)
        choice.is_finished = choice.is_cancelled = True
        if not record.open_choices:
            self.end(record, None)
        elif record.attempt is not None:
            self.books.reweigh(record, record.attempt)
            self.books.abort(record.attempt.decode, record.attempt.key, choice.number)

    def _deliver(self, record: RequestRecord, event: TokensEvent) -> None:
        if not record.is_canary:
            self.effects.append(Deliver(record.request_id, event))

    def _note_answer(self, record: RequestRecord, choice: Choice, *, is_computed: bool = False) -> None:
        """The decode worker holds what it produced of this choice; the last token only if another was drawn after
        it (`is_computed`).
        """
        if record.state is not State.RUNNING or record.attempt is None or not choice.output_ids:
            return
        num_tokens = len(choice.output_ids) - (not is_computed)
        self.placer.note_answer(record, choice, num_tokens, record.attempt.decode)

    def prefill_over(self, record: RequestRecord, attempt: Attempt) -> None:
        """The prefill side has nothing left to do for this attempt."""
        attempt.is_prefill_over = True
        self.books.prompt_computed(attempt)
        self.has_news = True

    def _finish_full(self, record: RequestRecord) -> None:
        """Finish choices that have all their tokens and lost only the word that they ended."""
        for choice in record.open_choices:
            if len(choice.output_ids) >= record.request.params.max_tokens:
                choice.is_finished = True
                event = TokensEvent(choice.number, len(choice.output_ids), (), "length")
                self._deliver(record, event)

    def _backoff(self, fruitless: int) -> float:
        """Nothing before the first retry: most failures are one lost worker."""
        if fruitless < 2:
            return 0.0
        return min(MAX_BACKOFF_S, self._config.retry_backoff_s * float(2 ** (fruitless - 2)))

    # ---- time

    def arm(self, record: RequestRecord) -> None:
        """Set the one timer of a request to whatever can happen to it next."""
        now, when = self._clock.now(), record.deadline
        if record.state is State.WAITING:
            when = min(when, record.unavailable_at)
            if (late_at := self.door.late_at(record)) > now:
                when = min(when, late_at)
            if record.not_before > now:
                when = min(when, record.not_before)
        elif record.state is State.DISPATCHED and record.attempt and self.books.unacknowledged(record.attempt):
            when = min(when, record.attempt.sent_at + self._config.unacknowledged_s)
        self._timers.arm(record.request_id, when)

    def on_timer(self, record: RequestRecord) -> None:
        """The request's timer went off: find out why."""
        now = self._clock.now()
        if now >= record.deadline:
            self.end(record, self._deadline_error(record))
            return
        if record.state is State.WAITING:
            self._on_waiting_timer(record, now)
        elif record.state is State.DISPATCHED and record.attempt is not None:
            late = self.books.unacknowledged(record.attempt)
            if late is not None and now >= record.attempt.sent_at + self._config.unacknowledged_s:
                waited = self._config.unacknowledged_s
                error = NodeLost(f"worker {late.worker_id} did not acknowledge a command within {waited:g} s")
                self.fail_attempt(record, error, (late,))
                return
        if record.state is not State.ENDED:
            self.arm(record)

    def _on_waiting_timer(self, record: RequestRecord, now: float) -> None:
        self.has_news = True
        if (late := self.door.too_late(record, now)) is not None:
            self.end(record, late)
            return
        if now < record.unavailable_at:
            return
        if self.placer.is_possible(record):
            # It waits for room, not for a worker: only its own deadline ends that.
            record.unavailable_at = now + self._config.unavailable_s
            return
        self.end(record, self._unavailable_error(record))

    def _deadline_error(self, record: RequestRecord) -> ServeError:
        timeout, tokens = record.request.timeout_s, record.num_output_tokens
        return DeadlineExceeded(
            f"timeout_s {timeout:g} passed while {record.state.value}, after {tokens} output tokens"
        )

    def _unavailable_error(self, record: RequestRecord) -> ServeError:
        longest = self._registry.max_sequence_tokens()
        why = f"{record.max_sequence_tokens} tokens needed, the longest a live worker holds is {longest}"
        after = f"; the last attempt failed: {record.last_error}" if record.last_error else ""
        return Unavailable(f"no worker could take the request within {self._config.unavailable_s:g} s: {why}{after}")
