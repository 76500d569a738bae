"""All requests that have not ended, who of them waits, and a bounded memory of those that have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from ..core.errors import BadRequest
from .fair_queue import FairQueue, Turn
from .interface import GenerateRequest
from .requests import RequestRecord, check_request

MAX_REMEMBERED = 4096


class RequestTable:
    """Requests by id, and the waiting ones in their turn: those that are tried again before all others."""

    def __init__(self) -> None:
        self.active: dict[str, RequestRecord] = {}
        self.waiting: FairQueue[RequestRecord] = FairQueue()
        self.waiting_tokens = 0  # of their prompts
        self._ended: OrderedDict[str, tuple[int, float]] = OrderedDict()  # id → last attempt, when
        self._count = 0

    def add(self, request: GenerateRequest, now: float) -> RequestRecord:
        """A new record in state WAITING that is not queued yet; raises BadRequest for a request no worker would accept
        or an id in use.
        """
        prompt_bytes = check_request(request)
        if request.request_id in self.active:
            raise BadRequest(f"request_id {request.request_id!r} is in use, give another", "request_id")
        self._count += 1
        record = RequestRecord(request, self._count, prompt_bytes, now, now + request.timeout_s)
        record.attempt_number = self._ended.get(request.request_id, (0, 0.0))[0]
        self.active[request.request_id] = record
        return record

    def discard(self, record: RequestRecord) -> None:
        """Forget a request that was refused at the door."""
        del self.active[record.request_id]

    def enqueue(self, record: RequestRecord) -> None:
        """A new one behind its flow, one that was tried before all flows."""
        self.waiting_tokens += record.num_prompt_tokens
        if record.num_attempts:
            self.waiting.add_first(record, record.order)
            return
        promise = record.promise
        deadline = record.submitted_at + promise.order_s
        self.waiting.add(record, promise.flow, weight=promise.weight, cost=record.cost_tokens, deadline=deadline)

    def leave(self, record: RequestRecord) -> None:
        """It waits no more and was not served."""
        self.waiting_tokens -= record.num_prompt_tokens
        self.waiting.remove(record)

    def offer(self, take: Callable[[RequestRecord], Turn]) -> None:
        """Those that wait, in their turn; see FairQueue."""

        def count(record: RequestRecord) -> Turn:
            turn = take(record)
            self.waiting_tokens -= record.num_prompt_tokens * (turn is Turn.TAKEN)
            return turn

        self.waiting.offer(count)

    def ahead(self, record: RequestRecord) -> Iterator[RequestRecord]:
        """What would be served before this one, which is not queued yet."""
        promise = record.promise
        deadline = record.submitted_at + promise.order_s
        return self.waiting.ahead(promise.flow, weight=promise.weight, cost=record.cost_tokens, deadline=deadline)

    def end(self, record: RequestRecord, now: float) -> None:
        """Move an ended request, already out of `waiting`, to the memory of old ones."""
        del self.active[record.request_id]
        self._ended[record.request_id] = (record.attempt_number, now)
        self._ended.move_to_end(record.request_id)
        while len(self._ended) > MAX_REMEMBERED:
            self._ended.popitem(last=False)

    def ended_at(self, request_id: str) -> float | None:
        """When a request that is remembered ended."""
        entry = self._ended.get(request_id)
        return entry[1] if entry else None
