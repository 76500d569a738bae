"""What requests teach the cost model as they go by: the phases of a first token, and the pace of a finished answer."""

from __future__ import annotations

from ..protocol.messages import Phases
from .cost_model import CostModel
from .offered import OfferedLoad
from .registry import Registry, WorkerRecord
from .requests import Attempt, Pace, RequestRecord
from .stream_limit import StreamLimit

MIN_PACED_TOKENS = 4  # after the first: fewer say more about chance than about pace


class Learner:
    def __init__(self, model: CostModel, streams: StreamLimit, registry: Registry, offered: OfferedLoad) -> None:
        self._model = model
        self._streams = streams
        self._registry = registry
        self._offered = offered

    def first_token(self, record: RequestRecord, attempt: Attempt, phases: Phases | None, now: float) -> None:
        """The attempt's first tokens came. Call before they are added to the request's."""
        decode = self._registry.find(attempt.decode)
        if decode is not None:
            busy_s, neighbour_s = decode.prompts.busy_s(now), self._neighbour_s(decode, now)
            attempt.pace = Pace(now, decode.num_running, decode.used_blocks, busy_s, neighbour_s)
        if phases is None:
            return
        self._prefill(record, attempt, phases, now)
        if attempt.prefill is not None and phases.transferred_blocks:
            self._model.saw_transfer(attempt.prefill, attempt.decode, phases.transferred_bytes, phases.transfer_s)

    def _prefill(self, record: RequestRecord, attempt: Attempt, phases: Phases, now: float) -> None:
        worker = self._registry.find(attempt.queue)
        num_new = record.prefill_tokens() - phases.cached_tokens
        if worker is None or num_new < 1 or phases.prefill_s <= 0:
            return
        num_beside = self._registry.neighbours_at_work(worker)
        self._model.saw_prefill(
            worker.key, num_new, phases.cached_tokens, worker.num_running, phases.prefill_s, num_beside
        )
        alone_s = self._model.prefill_s(worker.key, num_new, phases.cached_tokens)
        self._offered.note_computed(alone_s, phases.transfer_s, now)

    def answered(self, record: RequestRecord, attempt: Attempt, now: float) -> None:
        """Every choice has ended by itself, in this attempt."""
        self._model.saw_answer(record.num_output_tokens // len(record.choices))
        self._offered.note_answer(record.num_output_tokens, now)
        decode, pace = self._registry.find(attempt.decode), attempt.pace
        if decode is None or pace is None:
            return
        num_tokens = pace.num_tokens / max(1, attempt.streams)
        if num_tokens >= MIN_PACED_TOKENS:
            self._learn_pace(decode, pace, num_tokens, now)

    def _learn_pace(self, decode: WorkerRecord, pace: Pace, num_tokens: float, now: float) -> None:
        streams = (pace.num_running + decode.num_running) / 2
        held = (pace.used_blocks + decode.used_blocks) / 2 * decode.block_size
        busy_s = decode.prompts.busy_s(now) - pace.busy_s
        # A neighbour that left since then took its seconds along.
        neighbour_s = max(0.0, self._neighbour_s(decode, now) - pace.neighbour_s)
        tpot_s = (now - pace.since) / num_tokens
        self._model.saw_tokens(streams, held, busy_s / num_tokens, tpot_s, neighbour_s / num_tokens)
        self._streams.learn(streams, tpot_s)

    def _neighbour_s(self, decode: WorkerRecord, now: float) -> float:
        found = [self._registry.find(key) for key in decode.neighbours]
        return sum([worker.prompts.busy_s(now) for worker in found if worker is not None])
