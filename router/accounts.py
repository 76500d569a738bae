"""The books of attempts: which worker carries what, and what has been said to it about that."""

from __future__ import annotations

from ..core.clock import Clock
from ..core.ids import AttemptKey, WorkerKey
from ..protocol.messages import Abort, FromRouter, StartDecode, StartPrefill
from .config import RouterConfig
from .effects import Effect, Send
from .registry import Registry, WorkerRecord
from .request_table import RequestTable
from .requests import Attempt, RequestRecord


class Accounts:
    """Every change of a worker's load that an attempt causes. Commands about attempts are added to `effects`."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Clock,
        router_epoch: str,
        registry: Registry,
        table: RequestTable,
        effects: list[Effect],
    ) -> None:
        self._config = config
        self._clock = clock
        self._router_epoch = router_epoch
        self._registry = registry
        self._table = table
        self._effects = effects

    def current(self, key: AttemptKey) -> RequestRecord | None:
        """The request of which `key` is the current attempt."""
        record = self._table.active.get(key.request_id)
        return record if record is not None and record.attempt is not None and record.attempt.key == key else None

    def expected_blocks(self, worker: WorkerRecord) -> int:
        """Blocks that the attempts wanted on `worker` may hold there, without any sharing between requests."""
        records = [record for key in worker.attempts if (record := self.current(key)) is not None]
        return sum(self._blocks_at(record, worker) for record in records)

    def _blocks_at(self, record: RequestRecord, worker: WorkerRecord) -> int:
        assert record.attempt is not None
        if record.attempt.decode == worker.key:
            return record.attempt.blocks
        return -(-record.prefill_tokens() // worker.block_size)

    def release(self, record: RequestRecord) -> None:
        """Take the attempt off its workers' accounts and stop the sides that still work on it."""
        attempt = record.attempt
        if attempt is None:
            return
        self.prompt_computed(attempt)
        decode = self._registry.find(attempt.decode)
        if decode is not None:
            decode.used_blocks -= attempt.blocks
            decode.num_streams -= attempt.streams
            self.count_running(attempt, -attempt.streams)
        attempt.blocks = 0
        for key in attempt.workers:
            worker = self._registry.find(key)
            if worker is not None:
                worker.attempts.pop(attempt.key, None)
            is_over = attempt.is_decode_over if key == attempt.decode else attempt.is_prefill_over
            if worker is not None and worker.is_live and not is_over:
                self.abort(key, attempt.key)

    def prompt_computed(self, attempt: Attempt) -> None:
        worker = self._registry.find(attempt.queue)
        if worker is not None:
            worker.queued_tokens -= attempt.queued_tokens
            worker.prompts.remove(attempt.key, self._clock.now())
        attempt.queued_tokens = 0

    def count_running(self, attempt: Attempt, change: int) -> None:
        """Enter an attempt among the running ones of its decode worker once, and take it off once."""
        decode = self._registry.find(attempt.decode)
        if decode is not None and attempt.is_running == (change < 0):
            decode.num_running += change
            attempt.is_running = change > 0

    def reweigh(self, record: RequestRecord, attempt: Attempt) -> None:
        worker = self._registry.find(attempt.decode)
        if worker is not None:
            blocks = record.blocks(worker.block_size)
            worker.used_blocks += blocks - attempt.blocks
            attempt.blocks = blocks

    def abort(self, key: WorkerKey, attempt: AttemptKey, choice: int | None = None) -> None:
        """Send an Abort unless the same one is on its way."""
        body = Abort(attempt.request_id, attempt.attempt, choice)
        worker = self._registry.find(key)
        if worker is None:
            # Number 0: an incarnation the router does not know has no numbered commands.
            self._effects.append(Send(key, FromRouter(self._router_epoch, 0, body)))
        elif worker.note_abort(attempt, choice, self._clock.now(), self._config.unacknowledged_s):
            self.send(worker, body)

    def send(self, worker: WorkerRecord, body: Abort | StartDecode | StartPrefill) -> int:
        self._effects.append(worker.command(self._router_epoch, body))
        return worker.last_number

    def unacknowledged(self, attempt: Attempt) -> WorkerKey | None:
        """A worker of this attempt whose heartbeats do not cover its command yet."""
        pairs = [(attempt.decode, attempt.decode_number)]
        if attempt.prefill is not None and not attempt.is_prefill_over:
            pairs.append((attempt.prefill, attempt.prefill_number))
        for key, number in pairs:
            worker = self._registry.find(key)
            if worker is None or worker.received < number:
                return key
        return None
