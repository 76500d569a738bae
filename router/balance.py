"""Role balance: what the planner is told of the cluster, and what becomes of its decisions."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.messages import Role
from .config import RouterConfig
from .interface import RoleChange
from .lifecycle import Lifecycle
from .planner import Bounds, Change, Costs, Demand, Member, Planner, Snapshot
from .registry import Registry, WorkerRecord

MAX_REMEMBERED = 16
MIN_ANSWERS = 8  # in the window: fewer say less than the model's own mean
UNANSWERED_S = 10.0  # a worker that has not changed by then may be asked again

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A change of role that was asked for."""

    at: float
    by: str
    change: Change


class RoleBalance:
    """Asked every second while it is on. Changes that people ask for are recorded here too."""

    def __init__(
        self, config: RouterConfig, registry: Registry, life: Lifecycle, order: Callable[[WorkerRecord, Role], None]
    ) -> None:
        """`order` gives a worker its new role."""
        self._config = config
        self._registry = registry
        self._life = life
        self._order = order
        self._planner = Planner()
        self._asked: deque[_Asked] = deque(maxlen=MAX_REMEMBERED)
        self._counts: Counter[tuple[Role, Role, str]] = Counter()

    @property
    def is_on(self) -> bool:
        config = self._config
        return config.balance_roles and not config.fixed_roles and config.disaggregate != "never"

    def look(self, now: float) -> None:
        """Change one worker's role if that is worth it."""
        change = self._planner.decide(self._snapshot(now))
        worker = self._registry.find(change.worker) if change is not None else None
        if change is None or worker is None:
            return
        log.info("worker %s: from %s to %s: %s", change.worker, change.before, change.after, change.reason)
        self._note(_Asked(now, "planner", change))
        self._order(worker, change.after)

    def note_manual(self, worker: WorkerRecord, role: Role, now: float) -> None:
        """Somebody asks for it."""
        if worker.hello.role != role:
            self._note(_Asked(now, "operator", Change(worker.key, worker.hello.role, role, "asked for")))

    def _note(self, asked: _Asked) -> None:
        self._asked.append(asked)
        self._counts[asked.change.before, asked.change.after, asked.by] += 1

    def changes(self, now: float) -> list[RoleChange]:
        """The last ones, oldest first."""
        return [
            RoleChange(
                each.change.worker.worker_id,
                each.change.before,
                each.change.after,
                each.by,
                each.change.reason,
                now - each.at,
            )
            for each in self._asked
        ]

    def counts(self) -> list[tuple[str, str, str, int]]:
        """(from, to, by whom, how often)."""
        return [(*key, count) for key, count in sorted(self._counts.items())]

    # ---- what the planner is told

    def _snapshot(self, now: float) -> Snapshot:
        workers = [worker for worker in self._registry.live() if worker.is_ready]
        demand = self._demand(workers, now)
        model = self._life.placer.model
        holding = [worker.hello.total_blocks * worker.block_size for worker in workers]
        costs = Costs(
            base_s=model.token_s(0, 0),
            stream_s=model.slowdown_s(int(demand.context_tokens)),
            stall=model.stall,
            max_streams=self._config.max_worker_streams,
            kv_tokens=sum(holding) / max(1, len(holding)),
            target_ttft_s=self._config.target_ttft_s,
            target_tpot_s=self._config.target_tpot_s,
        )
        bounds = Bounds(self._config.min_prefill, self._config.min_decode)
        members = tuple(self._member(worker, now) for worker in workers)
        return Snapshot(now, members, demand, costs, bounds, may_mix=self._config.policy == "auto")

    def _member(self, worker: WorkerRecord, now: float) -> Member:
        asked = next((each for each in reversed(self._asked) if each.change.worker == worker.key), None)
        is_turning = asked is not None and asked.change.after != worker.hello.role and now - asked.at < UNANSWERED_S
        busy = worker.num_streams + worker.prompts.wait_s(now)
        # On its way it counts as what it will be.
        role = asked.change.after if asked is not None and is_turning else worker.hello.role
        return Member(worker.key, role, busy, is_turning)

    def _demand(self, workers: list[WorkerRecord], now: float) -> Demand:
        span_s, sums = self._life.offered.window(now)
        rate = sums.num_requests / span_s if span_s > 0 else 0.0
        prefill_s = sums.prefill_s / max(1, sums.num_computed)
        enough = sums.num_answers >= MIN_ANSWERS
        model = self._life.placer.model
        output = sums.num_output_tokens / sums.num_answers if enough else model.expected_output_tokens
        backlog_s = sum(worker.prompts.wait_s(now) for worker in workers)
        return Demand(
            requests_per_s=rate,
            prompt_tokens_per_s=sums.num_prompt_tokens / span_s if span_s > 0 else 0.0,
            output_tokens_per_s=rate * output,
            prefill_s=prefill_s,
            transfer_s=sums.transfer_s / max(1, sums.num_computed),
            context_tokens=sums.num_prompt_tokens / max(1, sums.num_requests) + output / 2,
            backlog_s=backlog_s + len(self._life.table.waiting) * prefill_s,
            num_streams=sum(worker.num_running for worker in workers),
            num_requests=sums.num_requests,
            num_computed=sums.num_computed,
        )
