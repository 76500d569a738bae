"""All requests that have not ended, who of them waits, and a bounded memory of those that have."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from ..core.errors import BadRequest
from .interface import GenerateRequest
from .requests import RequestRecord, check_request

MAX_REMEMBERED = 4096


def _order(record: RequestRecord) -> int:
    return record.order


class RequestTable:
    """Requests by id, and the waiting ones in order of acceptance: a retried request stands before younger ones."""

    def __init__(self) -> None:
        self.active: dict[str, RequestRecord] = {}
        self.waiting: list[RequestRecord] = []
        self._ended: OrderedDict[str, tuple[int, float]] = OrderedDict()  # id → last attempt, when
        self._count = 0

    def add(self, request: GenerateRequest, now: float) -> RequestRecord:
        """A new record in state WAITING; raises BadRequest for a request no worker would accept or an id in use."""
        prompt_bytes = check_request(request)
        if request.request_id in self.active:
            raise BadRequest(f"request_id {request.request_id!r} is in use, give another", "request_id")
        self._count += 1
        record = RequestRecord(request, self._count, prompt_bytes, now, now + request.timeout_s)
        record.attempt_number = self._ended.get(request.request_id, (0, 0.0))[0]
        self.active[request.request_id] = record
        self.waiting.append(record)
        return record

    def discard(self, record: RequestRecord) -> None:
        """Forget a request that was refused at the door."""
        del self.active[record.request_id]
        self.waiting.remove(record)

    def enqueue(self, record: RequestRecord) -> None:
        insort(self.waiting, record, key=_order)

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
