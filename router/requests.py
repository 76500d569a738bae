"""One request on its way through the router.

    WAITING ──to_dispatched──→ DISPATCHED ──to_running──→ RUNNING ──to_ended──→ ENDED
       ↑                           │                         │
       └────────to_waiting─────────┴─────────────────────────┘        every state but ENDED may go to ENDED

An attempt is one try on one decode worker, with or without a prefill worker. What it delivered stays with the request:
the next attempt goes on behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from ..core.errors import BadRequest, InternalError, ProtocolError, ServeError
from ..core.ids import AttemptKey, Ticket, WorkerKey
from ..protocol.messages import MAX_PROMPT_BYTES, ChoiceState, Tokens, check_ids, pack_ids
from ..protocol.sampling import check
from .classes import UNPROMISED, Promise
from .interface import Decision, GenerateRequest, Routing
from .rung_hash import RungHash

MAX_TIMEOUT_S = 1e9


class State(Enum):
    WAITING = "waiting for a worker"
    DISPATCHED = "waiting for the first token"
    RUNNING = "running"
    ENDED = "ended"


class Verdict(Enum):
    """What a Tokens message is to its choice."""

    NEW = "new"
    DUPLICATE = "duplicate"
    BROKEN = "broken"


@dataclass(slots=True, eq=False)
class Choice:
    """One of the n answers, with all tokens delivered so far."""

    number: int
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False
    is_cancelled: bool = False  # finished because the caller said so

    def judge(self, item: Tokens, max_tokens: int) -> tuple[Verdict, int]:
        """Whether `item` continues this choice, and how many of its leading tokens are already delivered."""
        skip = len(self.output_ids) - item.index
        if skip < 0 or item.index + len(item.tokens) > max_tokens:
            return Verdict.BROKEN, 0
        has_end = item.finish_reason is not None
        if skip > len(item.tokens) or (skip == len(item.tokens) and not has_end):
            return Verdict.DUPLICATE, skip
        return Verdict.NEW, skip


@dataclass(slots=True)
class Pace:
    """The decode worker when the first token of an attempt came, and how many tokens came since."""

    since: float
    num_running: int
    used_blocks: int
    busy_s: float  # with prompts, since its start
    neighbour_s: float  # the same of its neighbours, added up
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class Attempt:
    """One try. `blocks` and `queued_tokens` are what it weighs in the router's own accounts of its workers."""

    key: AttemptKey
    decode: WorkerKey
    prefill: WorkerKey | None
    ticket: Ticket | None
    sent_at: float
    blocks: int
    queued_tokens: int
    decode_number: int = 0  # of the command that started it there
    prefill_number: int = 0
    is_decode_over: bool = False  # this side needs no Abort
    is_prefill_over: bool = False
    has_progress: bool = False
    streams: int = 0  # in the books of its decode worker
    is_running: bool = False  # its first token has come
    pace: Pace | None = None

    @property
    def queue(self) -> WorkerKey:
        """The worker that computes the prompt."""
        return self.prefill or self.decode

    @property
    def workers(self) -> tuple[WorkerKey, ...]:
        return (self.decode, self.prefill) if self.prefill else (self.decode,)


@dataclass(slots=True, eq=False)
class RequestRecord:
    """What the router knows of one accepted request. State changes only through the `to_…` methods."""

    request: GenerateRequest
    order: int  # of acceptance; who waits longest goes first
    prompt_bytes: bytes
    submitted_at: float
    deadline: float
    attempt_number: int = 0  # of the last attempt; never reused for a request id
    state: State = State.WAITING
    attempt: Attempt | None = None
    choices: list[Choice] = field(default_factory=list)
    hashes: list[RungHash] | None = None  # of the prompt's full rungs; None where nothing reads them
    hash_block_size: int = 0
    block_names: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # of its full blocks, by cache format
    num_attempts: int = 0
    num_resumed: int = 0  # attempts that delivered something behind an earlier one's tokens
    fruitless: int = 0  # attempts in a row without a new token
    avoid: tuple[WorkerKey, ...] = ()  # blamed for the last failure
    prefilled_by: WorkerKey | None = None  # in the last attempt: it may still hold the prompt's blocks
    last_error: ServeError | None = None
    unavailable_at: float = 0.0
    not_before: float = 0.0
    route_s: float = 0.0
    queue_s: float = 0.0  # submission to the first dispatch
    has_phases: bool = False  # the caller has had them
    decision: Decision | None = None  # of the last attempt
    promise: Promise = UNPROMISED
    cost_tokens: float = 1.0  # prompt and expected answer, as its flow pays for them
    prefill_s: float = 0.0  # expected at the door
    foreseen_ttft_s: float | None = None  # at the door; None where nothing is to be kept
    foreseen_wait_s: float = 0.0
    promised_blocks: int = 0
    bypassed: int = 0  # later ones that went before it, since it found no room
    first_token_at: float = 0.0  # of the whole request
    is_canary: bool = False  # the router's own: nobody hears of it, and nothing is learnt from it

    def __post_init__(self) -> None:
        self.choices = [Choice(number) for number in range(self.request.params.n)]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def max_sequence_tokens(self) -> int:
        return self.num_prompt_tokens + self.request.params.max_tokens

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.choices)

    @property
    def open_choices(self) -> list[Choice]:
        return [choice for choice in self.choices if not choice.is_finished]

    @property
    def needs_local_prefill(self) -> bool:
        """Several choices with different outputs share no single sequence that another worker could compute."""
        return self.request.params.n > 1 and any(choice.output_ids for choice in self.choices)

    def choice(self, number: int) -> Choice | None:
        return self.choices[number] if number < len(self.choices) else None

    def choice_states(self) -> list[ChoiceState]:
        return [ChoiceState(choice.number, pack_ids(choice.output_ids)) for choice in self.open_choices]

    def blocks(self, block_size: int) -> int:
        """Blocks it needs for the next token of every open choice, with full prompt blocks shared."""
        shared = self.num_prompt_tokens // block_size
        own = (
            (self.num_prompt_tokens + len(choice.output_ids)) // block_size + 1 - shared for choice in self.open_choices
        )
        return shared + sum(own)

    def prefill_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled, without any cache."""
        return self.num_prompt_tokens + sum(len(choice.output_ids) for choice in self.open_choices)

    # ---- transitions

    def to_dispatched(self, attempt: Attempt, now: float) -> None:
        self._leave(State.WAITING)
        self.state = State.DISPATCHED
        self.attempt = attempt
        self.attempt_number = attempt.key.attempt
        self.num_attempts += 1
        self.route_s = now - self.submitted_at
        self.queue_s = self.route_s if self.num_attempts == 1 else self.queue_s

    def routing(self, now: float) -> Routing:
        """Of the current attempt, whose first tokens have come."""
        assert self.attempt is not None
        prefill = self.attempt.prefill.worker_id if self.attempt.prefill else None
        retry_s, attempt_s = self.route_s - self.queue_s, now - self.attempt.sent_at
        return Routing(self.queue_s, retry_s, attempt_s, self.attempt.decode.worker_id, prefill)

    def to_running(self) -> None:
        """The first tokens of an attempt are about to be taken; behind earlier ones, that is a resumption."""
        self._leave(State.DISPATCHED)
        self.num_resumed += self.num_output_tokens > 0
        self.state = State.RUNNING

    def to_waiting(self, error: ServeError, blamed: tuple[WorkerKey, ...], unavailable_at: float) -> None:
        """The attempt failed; the caller decides when to try again by `not_before`."""
        self._leave(State.DISPATCHED, State.RUNNING)
        assert self.attempt is not None
        self.fruitless = 0 if self.attempt.has_progress else self.fruitless + 1
        self.prefilled_by = self.attempt.prefill or self.prefilled_by
        self.state, self.attempt = State.WAITING, None
        self.last_error, self.avoid, self.unavailable_at = error, blamed, unavailable_at

    def to_ended(self) -> None:
        self._leave(State.WAITING, State.DISPATCHED, State.RUNNING)
        self.state, self.attempt = State.ENDED, None

    def _leave(self, *allowed: State) -> None:
        if self.state not in allowed:
            names = ", ".join(state.name for state in allowed)
            raise InternalError(f"request {self.request_id}: transition from {self.state.name}, allowed from {names}")


def check_request(request: GenerateRequest) -> bytes:
    """The prompt as it goes on the wire; raises BadRequest for what no worker would accept."""
    if not 1 <= len(request.request_id) <= 128:
        raise BadRequest(f"request_id: {len(request.request_id)} characters, give 1 to 128", "request_id")
    if len(request.cache_salt) > 1000:
        raise BadRequest(f"cache_salt: {len(request.cache_salt)} characters, give at most 1000", "cache_salt")
    if len(request.session) > 256:
        raise BadRequest(f"session: {len(request.session)} characters, give at most 256", "session")
    if not 0 < request.timeout_s <= MAX_TIMEOUT_S:
        raise BadRequest(
            f"timeout_s: {request.timeout_s}, give a number above 0 and up to {MAX_TIMEOUT_S:g}", "timeout_s"
        )
    if not request.prompt_ids:
        raise BadRequest("prompt: it has no tokens, give at least one", "prompt")
    if 4 * len(request.prompt_ids) > MAX_PROMPT_BYTES:
        raise BadRequest(f"prompt: {len(request.prompt_ids)} tokens, the bound is {MAX_PROMPT_BYTES // 4}", "prompt")
    try:
        check(request.params)
    except msgspec.ValidationError as err:
        raise BadRequest(f"sampling parameters: {err}") from err
    try:
        data = pack_ids(request.prompt_ids)
        check_ids(data)
    except (OverflowError, ProtocolError) as err:
        raise BadRequest(f"prompt: token ids must lie in [0, 2**31): {err}", "prompt") from err
    return data
