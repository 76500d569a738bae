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

from collections.abc import Iterator
from typing import NamedTuple

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
    worker: WorkerRecord
    cost: float  # of computing the prompt there, for all
    ready_s: float  # until it is computed


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
        best: tuple[float, Choice] | None = None
        for decode in options.decodes:
            decode_cost = self._decode_cost(options, decode)
            for cost, choice in self._ways(options, decode, prefills):
                if best is None or cost + decode_cost < best[0]:
                    best = cost + decode_cost, choice
        assert best is not None  # a decode worker without a linked prefill worker may stay
        return best[1]

    def _ways(self, options: Options, decode: WorkerRecord, prefills: list[_Ranked]) -> Iterator[tuple[float, Choice]]:
        """What the prompt costs with this decode worker: computed there, or by one of the cheapest others."""
        if options.may_stay:
            cost = self._prefill(options, decode).cost
            yield cost if decode.num_streams else cost * GAIN, Choice(decode, None)
        missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
        busy_s = decode.prompts.wait_s(options.now)
        num_tried = 0
        for ranked in prefills:
            if ranked.worker.key in decode.linked:
                transfer_s = self._model.transfer_s(ranked.worker.key, decode.key, missing)
                # Prompts that decode still computes for itself when this one arrives hold the new stream up.
                pause_s = self._model.stall * max(0.0, busy_s - ranked.ready_s - transfer_s)
                cost = ranked.cost + transfer_s
                yield cost + self._harm(pause_s, decode) if pause_s else cost, Choice(decode, ranked.worker)
                num_tried += 1
                if num_tried == NUM_TRIED:
                    return

    def _ranked(self, options: Options) -> list[_Ranked]:
        """Prefill workers by what the prompt costs there, the cheapest first."""
        found = options.prefills
        if not options.may_stay:  # rather a worker that failed it once than none
            found = list({worker.key: worker for d in options.decodes for worker in options.prefills_of(d)}.values())
        return sorted((self._prefill(options, worker) for worker in found), key=lambda r: (r.cost, r.worker.key))

    def _prefill(self, options: Options, worker: WorkerRecord) -> _Ranked:
        held = options.here(worker)
        wait_s = worker.prompts.wait_s(options.now)
        prefill_s = self._model.prefill_s(worker.key, options.num_tokens - held, held, worker.num_running)
        cost = wait_s + prefill_s * (1.0 + self.pressure)
        if worker.num_streams:
            pause_s = self._model.stall * prefill_s
            cost += worker.num_streams * self._harm(pause_s, worker, self._model.stall * wait_s)
        return _Ranked(worker, cost, wait_s + prefill_s)

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
