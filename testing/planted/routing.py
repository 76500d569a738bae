"""Bugs of the router and of what stands around it."""

from __future__ import annotations

from typing import Any

from ...kvtransfer import mesh
from ...kvtransfer.transports.shm import ShmBulk
from ...protocol.messages import AttemptFailed, StartPrefill
from ...router import lifecycle, request_table
from ...router.accounts import Accounts
from ...router.core import RouterCore
from ...router.membership import Membership
from ...router.prefix_index import PrefixIndex
from ...router.readiness import Readiness
from ...router.registry import Registry, WorkerRecord
from ...router.requests import RequestRecord
from ...router.service import RequestStream, RouterService
from ..memory_checks import check_peer_memory, check_prefix_churn, check_router_memory, check_stream_memory
from ..slow_reader import check_unread_stream
from ..storm import check_connection_storm
from .bug import Bug, Check, Seeds, plants
from .handoffs import ANY

PEACEFUL_DRAINS = range(5, 2000, 10)


def breaker_counts_400s(original: Any) -> Any:
    def on_message(self: RouterCore, frame: Any) -> Any:
        effects = original(self, frame)
        if isinstance(frame.body, AttemptFailed) and frame.body.code == "bad_request":
            effects += self.worker_lost(frame.worker_id, "its breaker is open")
        return effects

    return on_message


def decode_alone(original: Any) -> Any:
    def send(self: Accounts, worker: Any, body: Any) -> Any:
        return worker.last_number if isinstance(body, StartPrefill) else original(self, worker, body)

    return send


def every_ticket_twice(original: Any) -> Any:
    spare: list[Any] = []

    def new_ticket(ids: Any) -> Any:
        if not spare:
            spare.append(original(ids))
            return spare[0]
        return spare.pop()

    return new_ticket


def cancel_too_early(original: Any) -> Any:
    def cancel(self: RequestStream, choice: int | None = None) -> None:
        if self._events:
            original(self, choice)

    return cancel


def deaf_to_silence(original: Any) -> Any:
    return lambda self, key: None


def ready_while_draining(original: Any) -> Any:
    def is_ready(self: WorkerRecord) -> bool:
        return bool(original.fget(self)) or (self.is_live and self.state == "draining")

    return property(is_ready)


def those_that_say_so(original: Any) -> Any:
    def ready(self: Registry) -> list[WorkerRecord]:
        return [worker for worker in self.live() if worker.is_ready]

    return ready


def keep_empty_nodes(original: Any) -> Any:
    def forget(self: PrefixIndex, worker: Any) -> None:
        for holders in self._holders.values():
            holders.pop(worker, None)

    return forget


def never_unmap(original: Any) -> Any:
    kept: list[Any] = []

    def close(self: ShmBulk) -> None:
        kept.append(self._pool)

    return close


def resume_behind_the_wrong(original: Any) -> Any:
    def choice_states(self: RequestRecord) -> Any:
        for choice in self.open_choices:
            if choice.output_ids:
                choice.output_ids[-1] ^= 1
        return original(self)

    return choice_states


def head_of_line(original: Any) -> Any:
    def perform_one(self: RouterService, effect: Any) -> None:
        stream = self._streams.get(getattr(effect, "request_id", ""))
        if any(len(other._events) >= other._max_events for other in self._streams.values() if other is not stream):
            return  # waits until the slow one has been read
        original(self, effect)

    return perform_one


ROUTING_BUGS = [
    Bug(
        "11",
        "sglang#25811",
        "a request that is wrong counts against the worker that says so",
        plants((RouterCore, "on_message", breaker_counts_400s)),
        Seeds("I14", ANY),
    ),
    Bug(
        "12",
        "sglang#31206",
        "prefill is not asked (there: its breaker is open), and decode is sent to wait for it",
        plants((Accounts, "send", decode_alone)),
        Seeds("I14", ANY),
    ),
    Bug(
        "18",
        "vllm#43509, CVE-2026-94627",
        "two attempts share one ticket",
        plants((lifecycle, "new_ticket", every_ticket_twice)),
        Seeds("I5", ANY),
    ),
    Bug(
        "20",
        "vllm#58063",
        "decode keeps the memory of dead peers mapped",
        plants((ShmBulk, "close", never_unmap)),
        Check("I8", check_peer_memory),
    ),
    Bug(
        "21",
        "vllm#57061",
        "a request that is cancelled before its first event is kept for ever",
        plants((RequestStream, "cancel", cancel_too_early)),
        Check("I11", check_stream_memory),
    ),
    Bug(
        "23",
        "vllm#39863",
        "a worker that has died is called ready for ever",
        plants((Membership, "on_worker_timer", deaf_to_silence)),
        Seeds("I13", ANY),
    ),
    Bug(
        "28",
        "dynamo#13088",
        "prompts are sent to a worker that is leaving",
        plants((WorkerRecord, "is_ready", ready_while_draining), (Registry, "ready", those_that_say_so)),
        Seeds("I15", PEACEFUL_DRAINS),
    ),
    Bug(
        "31",
        "dynamo#11933, #5275, #4429",
        "the front remembers every request that it has ever had",
        plants((request_table, "MAX_REMEMBERED", lambda original: 1 << 30)),
        Check("I11", check_router_memory),
    ),
    Bug(
        "32",
        "dynamo#10774",
        "prefixes that no worker holds any more stay in the index",
        plants((PrefixIndex, "forget", keep_empty_nodes)),
        Check("I11", check_prefix_churn),
    ),
    Bug(
        "33",
        "Mooncake#1369, #3428",
        "everyone who connects gets a thread",
        plants((mesh, "_MAX_KNOCKING", lambda original: 1 << 30)),
        Check("I11", check_connection_storm),
    ),
    Bug(
        "38",
        "azrtydxb/Fastllm-proxy#19",
        "the probe is answered without asking whether any worker could serve",
        plants((Readiness, "why_not", lambda original: lambda self: "")),
        Seeds("I13", ANY),
    ),
    Bug(
        "wrong-resume",
        "of our own",
        "a new attempt starts behind a token that was never delivered",
        plants((RequestRecord, "choice_states", resume_behind_the_wrong)),
        Seeds("I2", ANY),
    ),
    Bug(
        "unread-stream",
        "of our own",
        "everybody waits for a client that does not read",
        plants((RouterService, "_perform_one", head_of_line)),
        Check("I10", check_unread_stream),
    ),
]
