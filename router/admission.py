"""Who is let in: a request is refused at once when it would be served too late or a bound is reached, not after it has
waited in vain.

    forecast         what is before it leaves no time for its target, by the fitted model
    late             it was let in and waited too long all the same: refused before anything was sent to a worker
    queued_tokens    prompt tokens that are not computed yet are at their bound
    promised_blocks  so are KV blocks that prompts and expected answers need

A forecast refuses nothing before the model has seen enough, nothing on its own (a request that need not wait is let in
whatever its target is), and nothing without a target.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from ..core.errors import TooManyRequests
from .classes import Classes
from .config import RouterConfig
from .interface import ClassStatus, GenerateRequest
from .outlook import Accuracy, look_out
from .placement import Placer
from .registry import Registry
from .request_table import RequestTable
from .requests import RequestRecord, State

MIN_PREFILLS = 16  # prompts whose cost must have been seen before a forecast refuses anything
SAFETY = 0.8  # of a target, that a forecast may reach
MAX_RETRY_AFTER_S = 60


@dataclass(slots=True)
class ClassBook:
    """Counts since the start."""

    refused: Counter[str] = field(default_factory=Counter)
    ttft: Counter[bool] = field(default_factory=Counter)  # whether the target was met
    tpot: Counter[bool] = field(default_factory=Counter)


class Door:
    """Refuses by raising TooManyRequests, or says with which error a request that waits is to end."""

    def __init__(self, config: RouterConfig, registry: Registry, placer: Placer, table: RequestTable) -> None:
        self._config = config
        self._registry = registry
        self._placer = placer
        self._table = table
        self._classes = Classes(config)
        self._books = {name: ClassBook() for name in self._classes.names}
        self._accuracy = Accuracy()
        self._promised_blocks = 0  # to active requests
        self._only_flow: object = None
        self.is_shared = config.refuse_late == "always"  # several flows, or targets, have been seen

    # ---- coming

    def introduce(self, record: RequestRecord, now: float) -> None:
        """What `record` is promised and expected to cost; raises BadRequest, or TooManyRequests to refuse it."""
        record.promise = self._classes.promise(record.request)
        model = self._placer.model
        output = min(float(record.request.params.max_tokens), model.expected_output_tokens)
        record.cost_tokens = record.num_prompt_tokens + output * record.request.params.n
        self._check_bounds(record)
        self._note_flow(record)
        if self.is_shared:
            record.prefill_s = self._placer.least_prefill_s(record)
            self._check_forecast(record, now)

    def accept(self, record: RequestRecord) -> None:
        record.promised_blocks = self._blocks(record)
        self._promised_blocks += record.promised_blocks
        self._placer.streams.enter(record)

    def note_refused(self, request: GenerateRequest, reason: str) -> None:
        """For a bound that is not kept here."""
        self._books[self._classes.promise(request).flow.class_name].refused[reason] += 1

    def _check_bounds(self, record: RequestRecord) -> None:
        if len(self._table.active) <= 1:
            return  # it is alone: waiting would not make it smaller
        queued = self._table.waiting_tokens + sum(worker.queued_tokens for worker in self._registry.live())
        bound = self._config.max_queued_tokens
        if queued + record.num_prompt_tokens > bound:
            raise self._refusal(
                record, "queued_tokens", 0.0, f"{queued} prompt tokens wait to be computed, the bound is {bound}"
            )
        blocks, most = self._promised_blocks, self._config.max_promised_blocks
        if most is not None and blocks + self._blocks(record) > most:
            raise self._refusal(
                record, "promised_blocks", 0.0, f"running requests need {blocks} KV blocks, the bound is {most}"
            )

    def _check_forecast(self, record: RequestRecord, now: float) -> None:
        target_s = record.promise.ttft_s
        if target_s is None or self._placer.model.num_prefills < MIN_PREFILLS:
            return
        outlook = look_out(self._placer, self._table, record, now)
        record.foreseen_ttft_s, record.foreseen_wait_s = outlook.ttft_s, outlook.wait_s
        ttft_s = self._accuracy.most_s(outlook.ttft_s)
        if outlook.wait_s <= 0 or ttft_s <= SAFETY * target_s:
            return
        raise self._refusal(
            record,
            "forecast",
            ttft_s - SAFETY * target_s,
            f"the first token is expected within {ttft_s:.3g} s, the target is {target_s:g} s",
        )

    def _note_flow(self, record: RequestRecord) -> None:
        flow = record.promise.flow
        self._only_flow = self._only_flow or flow
        if flow != self._only_flow or record.promise.ttft_s or record.promise.tpot_s:
            self.is_shared = True

    def _blocks(self, record: RequestRecord) -> int:
        """With its whole expected answer."""
        size = next((worker.block_size for worker in self._registry.live() if worker.can_decode), 1)
        return math.ceil(record.cost_tokens / size)

    # ---- waiting

    def late_at(self, record: RequestRecord) -> float:
        """From then on it cannot keep its target; never, for one without a target or with tokens under way."""
        target_s = record.promise.ttft_s
        if target_s is None or record.state is not State.WAITING or record.num_attempts:
            return math.inf
        return record.submitted_at + max(target_s - record.prefill_s, target_s / 2)

    def too_late(self, record: RequestRecord, now: float) -> TooManyRequests | None:
        """Why it should wait no longer. While no worker could take it at all, that is another matter."""
        if now < self.late_at(record) or not self._placer.is_possible(record):
            return None
        waited_s = now - record.submitted_at
        return self._refusal(
            record,
            "late",
            record.foreseen_wait_s,  # what was before it then is about what is before the next one now
            f"it waited {waited_s:.3g} s and cannot keep its target of {record.promise.ttft_s:g} s any more",
        )

    # ---- being served

    def first_token(self, record: RequestRecord) -> None:
        ttft_s = record.first_token_at - record.submitted_at
        if record.promise.ttft_s is not None:
            self._book(record).ttft[ttft_s <= record.promise.ttft_s] += 1
        if record.foreseen_ttft_s is not None and record.num_attempts == 1:
            self._accuracy.learn(record.foreseen_ttft_s, ttft_s)

    def end(self, record: RequestRecord, now: float, *, is_whole: bool) -> None:
        """An accepted request is over."""
        self._promised_blocks -= record.promised_blocks
        self._placer.streams.leave(record)
        longest = max(len(choice.output_ids) for choice in record.choices)
        if is_whole and record.promise.tpot_s is not None and longest > 1:
            tpot_s = (now - record.first_token_at) / (longest - 1)
            self._book(record).tpot[tpot_s <= record.promise.tpot_s] += 1

    # ---- views

    def status(self) -> list[ClassStatus]:
        return [self._class_status(name, book) for name, book in self._books.items()]

    def _class_status(self, name: str, book: ClassBook) -> ClassStatus:
        return ClassStatus(
            name=name,
            queued=self._table.waiting.depth(name),
            refused=dict(book.refused),
            ttft_met=book.ttft[True],
            ttft_missed=book.ttft[False],
            tpot_met=book.tpot[True],
            tpot_missed=book.tpot[False],
        )

    def check_invariants(self) -> None:
        """Raise AssertionError where the promises do not add up. For tests and the simulation."""
        promised = sum(record.promised_blocks for record in self._table.active.values())
        assert self._promised_blocks == promised, "promised blocks add up"

    def _book(self, record: RequestRecord) -> ClassBook:
        return self._books[record.promise.flow.class_name]

    def _refusal(self, record: RequestRecord, reason: str, late_s: float, what: str) -> TooManyRequests:
        self._book(record).refused[reason] += 1
        after_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(late_s)))
        return TooManyRequests(f"{what}; send it again in {after_s} s", after_s)
