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

from .cost_model import CostModel
from .options import Choice, Options
from .registry import WorkerRecord

NUM_TRIED = 4  # prefill workers tried with each decode worker, the cheapest first
GAIN = (
    0.95  # a hand-off has to be cheaper than this share of staying: figures are uncertain, and it has more to go wrong
)
PRESSURE_WEIGHT = 0.05


class Auto:
    """A chooser; remembers nothing but the pressure."""

    reads_prefixes = True

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self.pressure = 0.0

    def choose(self, options: Options) -> Choice:
        prefills = self._ranked(options)
        self._note_pressure(options, [worker for _, worker in prefills])
        stay = self._best_stay(options) if options.may_stay or options.must_stay or not prefills else None
        apart = self._best_pair(options, prefills) if not options.must_stay else None
        if apart is None or (stay is not None and stay[0] * GAIN <= apart[0]):
            assert stay is not None  # without a linked prefill worker staying is allowed
            return stay[1]
        return apart[1]

    def _ranked(self, options: Options) -> list[tuple[float, WorkerRecord]]:
        """Prefill workers by what the prompt costs there, the cheapest first."""
        if options.must_stay:
            return []
        found = options.prefills
        if not options.may_stay:  # rather a worker that failed it once than none
            found = list({worker.key: worker for d in options.decodes for worker in options.prefills_of(d)}.values())
        ranked = [(self._prefill_cost(options, worker), worker.key, worker) for worker in found]
        ranked.sort(key=lambda entry: entry[:2])
        return [(cost, worker) for cost, _, worker in ranked]

    def _prefill_cost(self, options: Options, worker: WorkerRecord) -> float:
        held = options.held(worker)
        prefill_s = self._model.prefill_s(worker.key, options.num_tokens - held, held, worker.num_running)
        return worker.prompts.wait_s(options.now) + prefill_s * (1.0 + self.pressure + self._beside(worker))

    def _decode_cost(self, options: Options, worker: WorkerRecord) -> float:
        """What its output costs, itself and others."""
        model, output = self._model, self._expected_output(options)
        tokens = options.num_tokens + output / 2
        held = worker.used_blocks * worker.block_size + tokens
        own_s = model.token_s(worker.num_streams + 1, held)
        return output * (own_s + worker.num_streams * model.slowdown_s(int(tokens)))

    def _beside(self, worker: WorkerRecord) -> float:
        """Stream seconds lost for each second of prefill there."""
        return self._model.stall * worker.num_running

    def _expected_output(self, options: Options) -> float:
        return min(float(options.record.request.params.max_tokens), self._model.expected_output_tokens)

    def _best_stay(self, options: Options) -> tuple[float, Choice]:
        costs = [
            (self._prefill_cost(options, worker) + self._decode_cost(options, worker), worker.key, worker)
            for worker in options.decodes
        ]
        cost, _, worker = min(costs, key=lambda entry: entry[:2])
        return cost, Choice(worker, None)

    def _best_pair(self, options: Options, prefills: list[tuple[float, WorkerRecord]]) -> tuple[float, Choice] | None:
        best: tuple[float, Choice] | None = None
        for decode in options.decodes:
            decode_cost = self._decode_cost(options, decode)
            missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
            linked = [entry for entry in prefills if entry[1].key in decode.linked][:NUM_TRIED]
            for prefill_cost, prefill in linked:
                cost = prefill_cost + decode_cost + self._model.transfer_s(prefill.key, decode.key, missing)
                if best is None or cost < best[0]:
                    best = cost, Choice(decode, prefill)
        return best

    def _note_pressure(self, options: Options, prefills: list[WorkerRecord]) -> None:
        workers = prefills or options.decodes
        waiting = sum(max(0, len(worker.prompts) - 1) for worker in workers) / len(workers)
        self.pressure += PRESSURE_WEIGHT * (waiting - self.pressure)
