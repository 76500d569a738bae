"""The policy `auto`: of all pairs of workers, and of prefilling where it decodes, what costs least by the fitted model.

The cost of a choice is the time that the request itself will take and what it takes from others, in seconds:

    wait + prefill + transfer                          until its first token
    + expected output tokens x time per token          until its last
    + prefill x pressure                               for prompts that come while it is computed
    + stall x prefill x streams beside it              where it is prefilled among running streams
    + expected output tokens x streams x slowdown      for the streams that it decodes with

`pressure` is how many prompts wait for each worker that computes prompts, as an average over the last decisions: where
nobody waits, work costs nobody anything, and where many do, a prompt goes where its prefix is cached even if it waits
there a little longer. Nothing here is a threshold that someone would have to set.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import NamedTuple

from ..core.ids import WorkerKey
from .cost_model import CostModel
from .options import Choice, Options
from .registry import WorkerRecord

NUM_TRIED = 4  # prefill workers tried with each decode worker, the cheapest first
GAIN = 0.95  # a hand-off has to be cheaper than this share of staying on an idle worker: it has more to go wrong
PRESSURE_WEIGHT = 0.05


class Targets(NamedTuple):
    """What an answer should keep to. One that misses its time per token counts as a whole time to first token lost."""

    ttft_s: float
    tpot_s: float


class _Ranked(NamedTuple):
    cost: float  # of computing the prompt there, for all
    key: WorkerKey
    worker: WorkerRecord
    ready_s: float  # until it is computed


_Scored = tuple[float, WorkerKey, WorkerRecord]
_Best = tuple[float, Choice | None]
_cost_and_key = itemgetter(0, 1)


class Auto:
    """A chooser; remembers nothing but the pressure."""

    reads_prefixes = True

    def __init__(self, model: CostModel, targets: Targets) -> None:
        self._model = model
        self._targets = targets
        self.pressure = 0.0

    def choose(self, options: Options) -> Choice:
        prefills = self._ranked(options)
        self._note_pressure(prefills, options)
        decodes = sorted(((self._decode_cost(options, w), w.key, w) for w in options.decodes), key=_cost_and_key)
        best = self._best_pair(options, decodes, prefills)
        if options.may_stay:
            best = self._best_stay(options, decodes, best)
        assert best[1] is not None  # where it may not stay, each decode worker has a linked prefill worker
        return best[1]

    def _best_pair(self, options: Options, decodes: list[_Scored], prefills: list[_Ranked]) -> _Best:
        """Both lists begin with the cheapest, so most pairs need not be looked at."""
        best: _Best = (math.inf, None)
        for decode_cost, _, decode in decodes:
            if not prefills or decode_cost + prefills[0].cost >= best[0]:
                break
            linked = decode.linked
            missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
            num_tried = 0
            for ranked in prefills:
                if ranked.worker.key not in linked:
                    continue
                num_tried += 1
                if num_tried > NUM_TRIED or decode_cost + ranked.cost >= best[0]:
                    break
                cost = decode_cost + ranked.cost + self._hand_off(options, decode, ranked, missing)
                if cost < best[0]:
                    best = cost, Choice(decode, ranked.worker)
        return best

    def _hand_off(self, options: Options, decode: WorkerRecord, ranked: _Ranked, missing: int) -> float:
        """The transfer, and the pause by prompts that decode still computes for itself when this one arrives."""
        transfer_s = self._model.transfer_s(ranked.worker.key, decode.key, missing)
        busy_s = decode.prompts.wait_s(options.now) - ranked.ready_s - transfer_s
        return transfer_s + self._harm(self._model.stall * busy_s, decode) if busy_s > 0 else transfer_s

    def _best_stay(self, options: Options, decodes: list[_Scored], best: _Best) -> _Best:
        for decode_cost, _, decode in decodes:
            if decode_cost >= best[0]:
                break
            cost = decode_cost + self._prefill(options, decode, best[0] - decode_cost).cost
            if not decode.num_streams and best[1] is not None and best[1].prefill is not None:
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

    def _prefill(self, options: Options, worker: WorkerRecord, bound: float = math.inf) -> _Ranked:
        """Beyond `bound` the cost may be too low: it is out of the question anyway."""
        held = options.here(worker)
        wait_s = worker.prompts.wait_s(options.now)
        prefill_s = self._model.prefill_s(worker.key, options.num_tokens - held, held, worker.num_running)
        cost = wait_s + prefill_s * (1.0 + self.pressure)
        if worker.num_streams and cost < bound:
            pause_s = self._model.stall * prefill_s
            cost += worker.num_streams * self._harm(pause_s, worker, self._model.stall * wait_s)
        return _Ranked(cost, worker.key, worker, wait_s + prefill_s)

    def _harm(self, pause_s: float, worker: WorkerRecord, before_s: float = 0.0) -> float:
        """What a pause is to a stream of this worker that pauses for `before_s` anyway. One that is long beside the
        whole answer is worse than many short ones, so it counts by its square as well; and it may put a
        short answer out of its target.
        """
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
        """What its output costs, itself and others."""
        model = self._model
        output = min(float(options.record.request.params.max_tokens), model.expected_output_tokens)
        tokens = options.num_tokens + output / 2
        own_s = model.token_s(worker.num_streams + 1, worker.used_blocks * worker.block_size + tokens)
        return output * (own_s + worker.num_streams * model.slowdown_s(int(tokens)))

    def _note_pressure(self, prefills: list[_Ranked], options: Options) -> None:
        workers = [ranked.worker for ranked in prefills] or options.decodes
        waiting = sum(max(0, len(worker.prompts) - 1) for worker in workers) / len(workers)
        self.pressure += PRESSURE_WEIGHT * (waiting - self.pressure)
