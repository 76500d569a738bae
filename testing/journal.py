"""What the clients of a simulated cluster saw, and whether it was right. Knows nothing of the system but its events.

I1 every accepted request ends exactly once     I2 what a client saw is a prefix of the fault-free run
I3 no token index is skipped, repeated or out of order
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.errors import ServeError
from ..protocol.messages import SampledToken
from ..protocol.sampling import SamplingParams
from ..router.canary import PREFIX as CANARY_PREFIX
from ..router.interface import EndEvent, GenerateRequest, TokensEvent
from .fake_engine import expected_run
from .history import HistoryWriter
from .invariants import InvariantBroken

__all__ = ["ChoiceRecord", "InvariantBroken", "Journal", "RequestRecord"]

PATIENCE_S = 50.0  # a request that is given more time than this never needs all of it


@dataclass(slots=True)
class ChoiceRecord:
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(slots=True)
class RequestRecord:
    request: GenerateRequest
    expected: list[tuple[list[SampledToken], str]]
    choices: list[ChoiceRecord]
    is_cancelled: bool = False
    cancelled_choices: set[int] = field(default_factory=set)
    end: EndEvent | None = None


class Journal:
    """Append-only record of every request, checked as it grows. `history` gets everything too."""

    def __init__(self, history: HistoryWriter | None = None) -> None:
        self.records: dict[str, RequestRecord] = {}
        self.num_open = 0
        self._history = history

    def is_over(self, request_id: str) -> bool:
        if request_id.startswith(CANARY_PREFIX):  # the router's own: no client knows when it ends
            return False
        record = self.records.get(request_id)
        return record is None or record.end is not None

    def accept(self, request: GenerateRequest) -> None:
        params: SamplingParams = request.params
        expected = [expected_run(request.prompt_ids, params, choice) for choice in range(params.n)]
        self.records[request.request_id] = RequestRecord(request, expected, [ChoiceRecord() for _ in range(params.n)])
        self.num_open += 1
        if self._history is not None:
            self._history.accept(request.request_id, request.prompt_ids, params)

    def cancel(self, request_id: str, choice: int | None) -> None:
        record = self.records[request_id]
        if choice is None:
            record.is_cancelled = True
        else:
            record.cancelled_choices.add(choice)
        if self._history is not None:
            self._history.cancel(request_id, choice)

    def on_tokens(self, request_id: str, event: TokensEvent) -> None:
        record = self.records[request_id]
        choice = record.choices[event.choice]
        where = f"{request_id} choice {event.choice}"
        if self._history is not None:
            ids = [token.token_id for token in event.tokens]
            self._history.tokens(request_id, event.choice, event.index, ids, event.finish_reason)
        if record.end is not None or choice.finish_reason is not None:
            raise InvariantBroken(f"I1 {where}: tokens after its end")
        if event.index != len(choice.tokens):
            raise InvariantBroken(f"I3 {where}: index {event.index} after {len(choice.tokens)} tokens")
        choice.tokens += event.tokens
        choice.finish_reason = event.finish_reason
        self._compare(where, choice, *record.expected[event.choice])

    def _compare(self, where: str, choice: ChoiceRecord, expected: list[SampledToken], reason: str) -> None:
        found = choice.tokens
        if found != expected[: len(found)]:
            wanted = [token.token_id for token in expected]
            what = "the logprobs" if choice.token_ids == wanted[: len(found)] else f"{choice.token_ids}"
            raise InvariantBroken(f"I2 {where}: {what} is no prefix of the fault-free run {wanted}")
        if choice.finish_reason is not None and (len(found), choice.finish_reason) != (len(expected), reason):
            raise InvariantBroken(f"I2 {where}: ended by {choice.finish_reason} after {len(found)} tokens")

    def on_end(self, request_id: str, event: EndEvent) -> None:
        record = self.records[request_id]
        if self._history is not None:
            self._history.end(request_id, event.error.code if event.error is not None else None)
        if record.end is not None:
            raise InvariantBroken(f"I1 {request_id}: ended twice")
        record.end = event
        self.num_open -= 1
        if event.error is not None:
            self._check_error(record, event.error)
        elif not record.is_cancelled:
            for number, choice in enumerate(record.choices):
                if choice.finish_reason is None and number not in record.cancelled_choices:
                    raise InvariantBroken(f"I1 {request_id}: ended well, but choice {number} has no finish")

    def _check_error(self, record: RequestRecord, error: ServeError) -> None:
        """An error is an end too, but not each is fair."""
        name = record.request.request_id
        if error.code == "cancelled" and not record.is_cancelled:
            raise InvariantBroken(f"I1 {name}: ended as cancelled, and nobody cancelled it")
        if error.code == "deadline_exceeded" and record.request.timeout_s > PATIENCE_S:
            raise InvariantBroken(f"I1 {name}: hung until its deadline of {record.request.timeout_s:g} s: {error}")

    def check_finished(self) -> None:
        """After everything has come to rest."""
        for request_id, record in self.records.items():
            if record.end is None:
                raise InvariantBroken(f"I1 {request_id}: accepted and never ended")
