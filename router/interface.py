"""What the gateway asks of the router, and what it hears back. No HTTP, no tensors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from ..core.errors import ServeError
from ..protocol.messages import FinishReason, Phases, Role, SampledToken, StepTime, WorkerLoad
from ..protocol.sampling import SamplingParams


class GenerateRequest(msgspec.Struct, frozen=True):
    """One user request. All n choices share the prompt. `timeout_s` counts from submission."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    timeout_s: float
    cache_salt: str = ""
    session: str = ""  # whose conversation it is, where the client says so: session-affinity keeps it on one worker
    class_name: str = ""  # empty: the one that `priority` says
    priority: int = 0  # places behind the default class in the list of classes; below 0: before it
    tenant: str = ""  # whose request it is: tenants share what there is
    target_ttft_s: float | None = None  # instead of the class's
    target_tpot_s: float | None = None


class Decision(msgspec.Struct, frozen=True):
    """Where an attempt was placed and what the fitted model expected of it, in seconds; TTFT from submission on."""

    policy: str
    decode: str
    prefill: str | None  # None: decode prefills for itself
    ttft_s: float
    tpot_s: float
    wait_s: float
    prefill_s: float
    transfer_s: float
    class_name: str = ""

    def report(self) -> dict[str, object]:
        """The vendor part of an answer; times in milliseconds."""
        return {
            "policy": self.policy,
            "class": self.class_name,
            "decode": self.decode,
            "prefill": self.prefill or self.decode,
            "predicted_ttft_ms": round(self.ttft_s * 1e3, 3),
            "predicted_tpot_ms": round(self.tpot_s * 1e3, 3),
            "predicted_queue_ms": round(self.wait_s * 1e3, 3),
            "predicted_prefill_ms": round(self.prefill_s * 1e3, 3),
            "predicted_transfer_ms": round(self.transfer_s * 1e3, 3),
        }


class Routing(msgspec.Struct, frozen=True):
    """What the router took for the attempt that gave the first token, and where it ran. Seconds."""

    queue_s: float  # submission to the first dispatch
    retry_s: float  # from there to the dispatch of this attempt
    attempt_s: float  # from there to its first tokens
    decode: str
    prefill: str | None = None  # None: prefilled on the decode worker


class TokensEvent(msgspec.Struct, frozen=True):
    """New tokens of one choice; `index` counts its output tokens from 0 and never skips or repeats.

    With a finish_reason no more tokens of this choice follow. `phases` and `decision` come with the first tokens of the
    request.
    """

    choice: int
    index: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    phases: Phases | None = None
    drafted: int = 0  # tokens that were verified for it beside those computed anyway
    accepted: int = 0  # of them, those among `tokens`
    routing: Routing | None = None  # with `phases`
    wait_s: float = 0.0  # from the choice's tokens before to the step that drew these, on the worker
    step: StepTime | None = None  # that step; None for tokens that came with a hand-off
    decision: Decision | None = None


class EndEvent(msgspec.Struct, frozen=True):
    """The last event of a request, exactly once.

    `error` is None when every choice finished or was cancelled by the caller.
    """

    error: ServeError | None = None
    attempts: int = 1
    route_s: float = 0.0  # submission to dispatch of the last attempt
    resumed: int = 0  # attempts that went on behind tokens already delivered


Event = TokensEvent | EndEvent


class GenerateStream(Protocol):
    """The events of one request, ending with EndEvent.

    Leaving early is `cancel`; both are safe at any time and twice.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self, choice: int | None = None) -> None:
        """Stop one choice (its tokens are enough), or the request. A cancelled request still ends with EndEvent."""
        ...


class WorkerStatus(msgspec.Struct, frozen=True):
    """One row of `penstock status`."""

    worker_id: str
    epoch: str
    role: Role
    pid: int
    state: str  # starting, ready, draining, stalled, lost
    load: WorkerLoad
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    transports: dict[str, str] = {}  # peer worker → transport of the live link
    restarts: int = 0
    dtype: str = ""  # of weights and KV cache
    turn_age_s: float = 0.0  # since its loop began its last turn, as of its last heartbeat
    num_attempts: int = 0  # that the router wants to live there
    expected_blocks: int = 0  # that these may hold: what is in use beyond it is held for nobody
    block_size: int = 0  # tokens in one of its blocks
    canary: str = ""  # why it does not count as ready though it says so
    breakers: dict[str, float] = {}  # legs left alone since attempts fail there → seconds until one may find out


class RoleChange(msgspec.Struct, frozen=True):
    """A worker was asked to be for something else, `age_s` ago, by the planner or by an operator."""

    worker_id: str
    before: Role
    after: Role
    by: str
    reason: str
    age_s: float


class ClassStatus(msgspec.Struct, frozen=True):
    """A class of requests: who waits, and counts since the start. Targets are those of requests that have any."""

    name: str
    queued: int = 0
    refused: dict[str, int] = {}  # reason → requests
    ttft_met: int = 0
    ttft_missed: int = 0
    tpot_met: int = 0
    tpot_missed: int = 0


class ClusterStatus(msgspec.Struct, frozen=True):
    ready: bool
    why_not_ready: str
    policy: str
    workers: list[WorkerStatus]
    active_requests: int
    queued_requests: int
    bytes_per_token: int = 0
    max_sequence_tokens: int = 0  # longest prompt + output any live worker can hold
    classes: list[ClassStatus] = []
    balances_roles: bool = False
    role_changes: list[RoleChange] = []  # the last ones, oldest first
    role_change_counts: list[tuple[str, str, str, int]] = []  # from, to, by whom, how often since the start


class Router(Protocol):
    """The router as the gateway sees it."""

    def submit(self, request: GenerateRequest) -> GenerateStream:
        """Accept a request; raises BadRequest, Overloaded, TooManyRequests or Unavailable when it is refused."""
        ...

    def status(self) -> ClusterStatus: ...

    def reset_prefix_cache(self) -> None: ...

    def set_role(self, worker_id: str, role: Role) -> None:
        """Ask a worker to be for something else, running sequences and caches kept. Raises BadRequest."""
        ...

    def drain(self) -> None:
        """Refuse new requests from now on; running ones finish."""
        ...
