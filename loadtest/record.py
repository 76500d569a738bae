"""What the client saw of one request. Seconds since the start of the run, by one monotonic clock."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import StrEnum


class ErrorKind(StrEnum):
    """Why a request has no whole answer."""

    REFUSED = "refused"  # 429: the server says that it has too much to do
    BAD_REQUEST = "bad_request"  # any other 4xx
    SERVER_ERROR = "server_error"  # 5xx
    TIMEOUT = "timeout"
    CONNECTION = "connection"  # before the answer began
    BROKEN_STREAM = "broken_stream"  # after it: cut off, an error event, or not what a stream looks like
    EMPTY = "empty"  # a whole stream without a token
    GIVEN_UP = "given_up"  # by the client: the verdict of a search's probe was known before its end


@dataclass(frozen=True, slots=True)
class Failure:
    kind: ErrorKind
    detail: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """The server's count of tokens; None where it does not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    accepted_tokens: int | None = None
    rejected_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What was planned. Tokens are planned ones; the server's own count is in `Use`."""

    number: int
    intended_s: float
    prompt_tokens: int
    output_tokens: int
    turn: int = 0
    category: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event of the stream that brought something: when, and how many tokens; None where the server does not say."""

    at_s: float
    tokens: int | None


@dataclass(slots=True)
class Record:
    """One request from its intended time to its last byte."""

    asked: Asked
    sent_s: float = 0.0
    end_s: float = 0.0
    arrivals: list[Arrival] = field(default_factory=list)
    first_s: float | None = None  # the first event with text
    last_s: float | None = None  # the last event that brought a token or the end
    use: Use = field(default_factory=Use)
    chunk_tokens: int = 0  # counted by chunks, for servers that send no usage
    finish_reason: str | None = None
    has_begun: bool = False  # the answer's head has come
    failure: Failure | None = None
    phases: dict[str, float] = field(default_factory=dict)  # Penstock's own, ms; empty elsewhere

    @property
    def is_completed(self) -> bool:
        return self.failure is None

    @property
    def is_given_up(self) -> bool:
        return self.failure is not None and self.failure.kind is ErrorKind.GIVEN_UP

    @property
    def output_tokens(self) -> int:
        return self.chunk_tokens if self.use.completion_tokens is None else self.use.completion_tokens

    @property
    def lag_s(self) -> float:
        """How much later than intended the request was sent: the client's own lateness."""
        return max(0.0, self.sent_s - self.asked.intended_s)

    @property
    def ttft_s(self) -> float | None:
        """From the intended time to the first event with text."""
        return None if self.first_s is None else self.first_s - self.asked.intended_s

    @property
    def service_ttft_s(self) -> float | None:
        """The same from the time at which the request was really sent."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.asked.intended_s

    @property
    def first_tokens(self) -> int:
        """Tokens that had come with the first event that had text; 1 where the server does not say."""
        if self.first_s is None:
            return 0
        upto = [one.tokens for one in self.arrivals if one.at_s <= self.first_s]
        return 1 if not upto or None in upto else max(1, sum(t for t in upto if t is not None))

    @property
    def tpot_s(self) -> float | None:
        """(last token − first token) / tokens after those of the first event; None when there are none."""
        later = self.output_tokens - self.first_tokens
        if self.first_s is None or self.last_s is None or later < 1:
            return None
        return (self.last_s - self.first_s) / later

    @property
    def gaps_s(self) -> list[float]:
        """Time between events that brought tokens: inter-chunk latency, whatever the number of tokens in a chunk."""
        times = [one.at_s for one in self.arrivals if one.tokens != 0]
        return [b - a for a, b in itertools.pairwise(times)]
