"""Settings of the router, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

from ..core.config import DEFAULT_CLASSES, ClassConfig, Disaggregate, RefuseLate, check_classes
from ..core.errors import ConfigError
from ..core.policy import PolicyName


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Times in seconds.

    disaggregate: "auto" hands prompts to a linked prefill worker when there is one, "always" waits for one, "never"
    prefills on the decode worker. In "auto", prompts with at most `local_prefill_max_tokens` tokens that the decode
    worker does not hold are prefilled there. `expected_workers` must have been ready once before the cluster calls
    itself ready.
    """

    policy: PolicyName = "least-loaded"
    disaggregate: Disaggregate = "auto"
    local_prefill_max_tokens: int = 0
    max_queued_requests: int = 1024  # accepted, waiting for a worker
    max_active_requests: int = 4096  # accepted, not ended
    worker_timeout_s: float = 1.5  # silence after which a worker counts as lost
    unacknowledged_s: float = 2.0  # a command that no heartbeat covers by then is lost
    breaker_failures: int = 5  # in a row, that a worker is to blame for: then it is left alone for a while
    breaker_pause_s: float = 1.0  # at first; doubles, at most 30 s
    max_attempts: int = 4  # in a row without a new token
    unavailable_s: float = 30.0  # wait for a worker that could take the request at all
    retry_backoff_s: float = 0.05  # before the third attempt; doubles, at most 1 s
    max_imbalance_tokens: int = 8192  # prefix-affinity gives way when its pick carries this much more than the idlest
    target_ttft_s: float = 10.0  # what `auto` tries to keep answers within
    target_tpot_s: float = 0.1
    classes: tuple[ClassConfig, ...] = DEFAULT_CLASSES  # the most urgent first
    default_class: str = "standard"
    refuse_late: RefuseLate = "auto"
    max_queued_tokens: int = 1 << 24  # prompt tokens not yet computed
    max_promised_blocks: int | None = None  # of prompts and expected answers; None: no bound
    max_prefix_blocks: int = 65536  # of the prefix index
    max_exact_blocks: int = 0  # of the exact index, which workers tell of their caches; 0: there is none
    expected_workers: int = 0
    canary: bool = False  # a worker gives one token before it counts as ready (`canary`)
    canary_idle_s: float = 60.0  # and again after so long without any; 0: never
    balance_roles: bool = False  # the planner may change roles (`planner`)
    min_prefill: int = 1  # workers for prompts that it leaves, those for both included
    min_decode: int = 1
    max_worker_streams: int = 1 << 16  # in a worker's batch, as far as the planner is concerned
    fixed_roles: str = ""  # why no worker may be given another role; empty: it may

    def __post_init__(self) -> None:
        if self.policy not in get_args(PolicyName):
            raise ConfigError(f"policy {self.policy!r}: choose one of {', '.join(get_args(PolicyName))}")
        if self.disaggregate not in get_args(Disaggregate):
            raise ConfigError(f"disaggregate {self.disaggregate!r}: choose one of {', '.join(get_args(Disaggregate))}")
        if self.refuse_late not in get_args(RefuseLate):
            raise ConfigError(f"refuse_late {self.refuse_late!r}: choose one of {', '.join(get_args(RefuseLate))}")
        check_classes(self.classes, self.default_class)
        zero_allowed = (
            "local_prefill_max_tokens",
            "max_imbalance_tokens",
            "expected_workers",
            "retry_backoff_s",
            "max_exact_blocks",
            "canary",
            "canary_idle_s",
            "balance_roles",
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, (str, tuple)):
                continue
            if value < 0 or (value == 0 and field.name not in zero_allowed):
                raise ConfigError(
                    f"{field.name} {value}: must be {'at least' if field.name in zero_allowed else 'above'} 0"
                )


@dataclass(slots=True)
class RouterCounters:
    """Sums since the start; they only grow."""

    accepted: int = 0
    ended: int = 0
    attempts: int = 0
    retries: int = 0
    resumed: int = 0  # attempts that went on behind delivered tokens
    workers_lost: int = 0
    workers_stalled: int = 0  # times that a worker's loop stopped turning while its heartbeats went on
    stale_messages: int = 0  # from an attempt or incarnation that is not the current one
    duplicate_tokens: int = 0  # messages that repeat what was delivered
    breakers_opened: int = 0  # times that a worker's leg was left alone because attempts failed there
    broken_streams: int = 0  # attempts given up because of a gap or an impossible message
    orphans_aborted: int = 0
    local_prefills: int = 0
    remote_prefills: int = 0
