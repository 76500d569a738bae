"""Decisions the slow and obvious way: every pair's and every worker's cost in full, every worker asked for everything.

`router.placement` and `router.auto` must decide the same, one decision after the other.
"""

from __future__ import annotations

import math
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from penstock.core.ids import WorkerKey
from penstock.router.auto import GAIN, NUM_TRIED, PRESSURE_WEIGHT, Targets
from penstock.router.cost_model import CostModel
from penstock.router.forecast import forecast
from penstock.router.options import Choice, Options
from penstock.router.placement import LOCAL_AFTER_FAILURES, Placement, Placer, Refusal
from penstock.router.prefix_ladder import covered_tokens
from penstock.router.probing import Best, Probing
from penstock.router.registry import WorkerRecord
from penstock.router.requests import RequestRecord


class _Ranked(NamedTuple):
    cost: float  # of computing the prompt there, for all
    key: WorkerKey
    worker: WorkerRecord
    ready_s: float  # until it is computed


_Scored = tuple[float, WorkerKey, WorkerRecord]
_cost_and_key = itemgetter(0, 1)


class SlowAuto:
    """As `Auto`."""

    reads_prefixes = True

    def __init__(self, model: CostModel, targets: Targets) -> None:
        self._model = model
        self._targets = targets
        self.probing = Probing()
        self.pressure = 0.0

    def choose(self, options: Options) -> Choice:
        prefills = self._ranked(options)
        decodes = sorted(((self._decode_cost(options, w), w.key, w) for w in options.decodes), key=_cost_and_key)
        pair = self._best_pair(options, decodes, prefills)
        self._note_pressure(prefills, options)
        if not options.may_stay:
            assert pair[1] is not None
            return pair[1]
        stay = self._best_stay(options, decodes, pair[1] is not None)
        if stay[0] >= pair[0] and self.probing.due() is not False:
            stay = (math.inf, None)
        return self.probing.choose(pair, stay)

    def _best_pair(self, options: Options, decodes: list[_Scored], prefills: list[_Ranked]) -> Best:
        best: Best = (math.inf, None)
        for decode_cost, _, decode in decodes:
            missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
            for ranked in [ranked for ranked in prefills if ranked.key in decode.linked][:NUM_TRIED]:
                cost = decode_cost + ranked.cost + self._hand_off(options, decode, ranked, missing)
                if cost < best[0]:
                    best = cost, Choice(decode, ranked.worker)
        return best

    def _hand_off(self, options: Options, decode: WorkerRecord, ranked: _Ranked, missing: int) -> float:
        transfer_s = self._model.transfer_s(ranked.key, decode.key, missing)
        busy_s = decode.prompts.wait_s(options.now) - ranked.ready_s - transfer_s
        return transfer_s + self._harm(self._model.stall * busy_s, decode) if busy_s > 0 else transfer_s

    def _best_stay(self, options: Options, decodes: list[_Scored], is_pair: bool) -> Best:
        best: Best = (math.inf, None)
        for decode_cost, _, decode in decodes:
            cost = decode_cost + self._prefill(options, decode).cost
            if is_pair and not decode.num_streams:
                cost *= GAIN
            if cost < best[0]:
                best = cost, Choice(decode, None)
        return best

    def _ranked(self, options: Options) -> list[_Ranked]:
        """Prefill workers by what the prompt costs there, the cheapest first."""
        found = options.prefills
        if not options.may_stay:  # rather a worker that failed it once than none
            found = list({worker.key: worker for d in options.decodes for worker in options.prefills_of(d)}.values())
        return sorted([self._prefill(options, worker) for worker in found], key=_cost_and_key)

    def _prefill(self, options: Options, worker: WorkerRecord) -> _Ranked:
        held = options.here(worker)
        wait_s = worker.prompts.wait_s(options.now)
        prefill_s = self._model.prefill_s(
            worker.key, options.num_tokens - held, held, worker.num_running, _num_beside(options, worker)
        )
        cost = wait_s + prefill_s * (1.0 + self.pressure)
        if worker.num_streams:
            pause_s = self._model.stall * prefill_s
            cost += worker.num_streams * self._harm(pause_s, worker, self._model.stall * wait_s)
        stall = self._model.neighbour_stall
        for decode in options.decodes:
            if worker.key in decode.neighbours and decode.num_streams:
                cost += decode.num_streams * self._harm(stall * prefill_s, decode, stall * wait_s)
        return _Ranked(cost, worker.key, worker, wait_s + prefill_s)

    def _harm(self, pause_s: float, worker: WorkerRecord, before_s: float = 0.0) -> float:
        model = self._model
        token_s = model.token_s(worker.num_streams, worker.used_blocks * worker.block_size)
        life_s = max(model.expected_output_tokens * token_s, 1e-3)
        harm_s = pause_s * (1.0 + (2.0 * before_s + pause_s) / life_s)
        slack_s = self._targets.tpot_s - token_s
        if slack_s > 0:
            below = model.lengths.share_below
            harm_s += self._targets.ttft_s * (below((before_s + pause_s) / slack_s) - below(before_s / slack_s))
        return harm_s

    def _decode_cost(self, options: Options, worker: WorkerRecord) -> float:
        model = self._model
        output = min(float(options.record.request.params.max_tokens), model.expected_output_tokens)
        tokens = options.num_tokens + output / 2
        own_s = model.token_s(worker.num_streams + 1, worker.used_blocks * worker.block_size + tokens)
        return output * (own_s + worker.num_streams * model.slowdown_s(int(tokens)))

    def _note_pressure(self, prefills: list[_Ranked], options: Options) -> None:
        workers = [ranked.worker for ranked in prefills] or options.decodes
        waiting = sum(max(0, len(worker.prompts) - 1) for worker in workers) / len(workers)
        self.pressure += PRESSURE_WEIGHT * (waiting - self.pressure)


def _num_beside(options: Options, worker: WorkerRecord) -> int:
    """Neighbours at work among those that may be chosen."""
    mine = [p for p in options.prefills if p.key in worker.neighbours] if worker in options.decodes else []
    theirs = [d for d in options.decodes if worker.key in d.neighbours]
    return sum(other.is_at_work for other in (*mine, *theirs))


class SlowPlacer(Placer):
    """As `Placer`, with what it looks at asked for anew each time."""

    def place(self, record: RequestRecord, now: float) -> Placement | Refusal:
        able = [worker for worker in self._registry.all() if self._is_able(record, worker)]
        roomy = [worker for worker in able if self._has_room(record, worker)]
        if not able:
            return Refusal.NO_WORKER
        if not roomy:
            return Refusal.NO_ROOM
        trusted = [worker for worker in roomy if self.breakers.allows(worker.key, "decode", now)]
        options = self._look(record, trusted or roomy, now)
        decode, prefill = self._chooser.choose(options)
        uncached = max(0, options.num_tokens - options.held_tokens.get((prefill or decode).key, 0))
        num_beside = self._registry.neighbours_at_work(prefill or decode)
        return Placement(decode, prefill, uncached, forecast(self.model, options, decode, prefill, num_beside))

    def _is_able(self, record: RequestRecord, worker: WorkerRecord) -> bool:
        if not (
            worker.is_ready and worker.can_decode and worker.hello.max_sequence_tokens >= record.max_sequence_tokens
        ):
            return False
        return not self._needs_handoff(record) or bool(self._able_to_prefill(record, worker))

    def _has_room(self, record: RequestRecord, decode: WorkerRecord) -> bool:
        if self._needs_handoff(record) and not self._free_to_prefill(record, decode):
            return False
        needed = decode.used_blocks + record.blocks(decode.block_size)
        return not decode.attempts or (decode.has_place and needed <= decode.hello.total_blocks)

    def _look(self, record: RequestRecord, decodes: list[WorkerRecord], now: float) -> Options:
        size, needed = decodes[0].block_size, record.prefill_tokens()
        matches = self.index.matches(self.hash_prompt(record, size) if self._chooser.reads_prefixes else [])
        is_stuck = self._config.disaggregate == "auto" and record.fruitless >= LOCAL_AFTER_FAILURES
        must_stay = self._config.disaggregate == "never" or record.needs_local_prefill or is_stuck
        return Options(
            record=record,
            now=now,
            num_tokens=needed,
            decodes=[worker for worker in decodes if worker.key not in record.avoid] or decodes,
            prefills=[]
            if must_stay
            else [w for w in self._registry.all() if self._may_prefill(record, w, needed, now)],
            prefills_of=partial(self._prefills_of, record, now),
            held_tokens={key: covered_tokens(depth, size) for key, depth in matches.expected.items()},
            here_tokens={key: covered_tokens(depth, size) for key, depth in matches.here.items()},
            may_stay=must_stay or self._config.disaggregate != "always",
            must_stay=must_stay,
        )

    def _may_prefill(self, record: RequestRecord, worker: WorkerRecord, needed: int, now: float) -> bool:
        is_free = worker.is_ready and worker.can_prefill and worker.has_place
        fits = worker.hello.max_sequence_tokens >= needed and worker.key not in record.avoid
        return is_free and fits and self.breakers.allows(worker.key, "prefill", now)
