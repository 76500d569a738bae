"""What the clients saw, and whether it was right. Knows nothing of the system but its events.

I1 every accepted request ends exactly once     I2 what a client saw is a prefix of the fault-free run
I3 no token index is skipped, repeated or out of order
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.sampling import SamplingParams
from ..router.interface import EndEvent, GenerateRequest, TokensEvent
from .fake_engine import expected_tokens


class InvariantBroken(AssertionError):
    """A promise of the system does not hold; the text starts with its name (I1 … I11)."""


@dataclass(slots=True)
class ChoiceRecord:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class RequestRecord:
    request: GenerateRequest
    expected: list[tuple[list[int], str]]
    choices: list[ChoiceRecord]
    is_cancelled: bool = False
    cancelled_choices: set[int] = field(default_factory=set)
    end: EndEvent | None = None


class Journal:
    """Append-only record of every request, checked as it grows."""

    def __init__(self) -> None:
        self.records: dict[str, RequestRecord] = {}

    def accept(self, request: GenerateRequest) -> None:
        params: SamplingParams = request.params
        expected = [expected_tokens(request.prompt_ids, params, choice) for choice in range(params.n)]
        self.records[request.request_id] = RequestRecord(request, expected, [ChoiceRecord() for _ in range(params.n)])

    def on_tokens(self, request_id: str, event: TokensEvent) -> None:
        record = self.records[request_id]
        choice = record.choices[event.choice]
        where = f"{request_id} choice {event.choice}"
        if record.end is not None or choice.finish_reason is not None:
            raise InvariantBroken(f"I1 {where}: tokens after its end")
        if event.index != len(choice.token_ids):
            raise InvariantBroken(f"I3 {where}: index {event.index} after {len(choice.token_ids)} tokens")
        choice.token_ids += [t.token_id for t in event.tokens]
        choice.finish_reason = event.finish_reason
        expected, reason = record.expected[event.choice]
        if choice.token_ids != expected[: len(choice.token_ids)]:
            raise InvariantBroken(f"I2 {where}: {choice.token_ids} is no prefix of {expected}")
        if event.finish_reason is not None and (choice.token_ids, event.finish_reason) != (expected, reason):
            raise InvariantBroken(f"I2 {where}: ended by {event.finish_reason} after {len(choice.token_ids)} tokens")

    def on_end(self, request_id: str, event: EndEvent) -> None:
        record = self.records[request_id]
        if record.end is not None:
            raise InvariantBroken(f"I1 {request_id}: ended twice")
        record.end = event
        if event.error is not None or record.is_cancelled:
            return
        for number, choice in enumerate(record.choices):
            if choice.finish_reason is None and number not in record.cancelled_choices:
                raise InvariantBroken(f"I1 {request_id}: ended well, but choice {number} has no finish")

    def check_finished(self) -> None:
        """After everything has come to rest."""
        for request_id, record in self.records.items():
            if record.end is None:
                raise InvariantBroken(f"I1 {request_id}: accepted and never ended")
