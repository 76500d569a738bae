"""The policy `auto`: of all pairs of workers, and of prefilling where it decodes, what costs least by the fitted model.

The cost of a choice is the time that the request itself will take and what it takes from others, in seconds:

    wait + prefill + transfer                          until its first token
    + expected output tokens x time per token          until its last
    + prefill x pressure                               for prompts that come while it is computed
    + stall x prefill x streams beside it              where it is prefilled, on that worker and on its machine
    + expected output tokens x streams x slowdown      for the streams that it decodes with

`pressure` is how many prompts wait for each worker that computes prompts, as an average over the last decisions: where
nobody waits, work costs nobody anything, and where many do, a prompt goes where its prefix is cached even if it waits
there a little longer. Nothing here is a threshold that someone would have to set.

Among many workers most are out of the question at a glance. What a prompt takes from the streams of a worker is
reckoned in full only where a lower bound of its cost has come to the front; the choice is that of reckoning everything
(`tests/router/slow_placement.py` does).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

from ..core.ids import WorkerKey
from .cost_model import CostModel
from .options import Choice, Options
from .probing import Best, Probing
from .registry import WorkerRecord

NUM_TRIED = 4  # prefill workers tried with each decode worker, the cheapest first
GAIN = 0.95  # a hand-off has to be cheaper than this share of staying on an idle worker: it has more to go wrong
PRESSURE_WEIGHT = 0.05
ALMOST = 1.0 - 1e-9  # keeps a lower bound one, whatever rounding does


class Targets(NamedTuple):
    """What an answer should keep to. One that misses its time per token counts as a whole time to first token lost."""

    ttft_s: float
    tpot_s: float


# Plain tuples, which sort by cost and then by worker: there are hundreds in each decision.
_Decoding = tuple[float, WorkerKey, WorkerRecord]  # what the output costs there
_Computing = tuple[float, WorkerKey, WorkerRecord, float, float, bool]  # cost, …, wait_s, prefill_s, whether in full


class Auto:
    """A chooser; remembers the pressure, and which way it has not taken for long."""

    reads_prefixes = True

    def __init__(self, model: CostModel, targets: Targets) -> None:
        self._model = model
        self._targets = targets
        self.probing = Probing()
        self.pressure = 0.0
        self._beside: dict[WorkerKey, list[WorkerRecord]] = {}  # of a prefill worker: its neighbours with streams
        self._num_beside: dict[WorkerKey, int] = {}  # neighbours at work

    def choose(self, options: Options) -> Choice:
        prefills = self._prefills(options)
        self._beside, self._num_beside = _beside(options.decodes, options.prefills)
        cheapest = _Cheapest(self._computing(options, prefills), self._in_full)
        decodes = self._decoding(options)
        pair = self._best_pair(options, decodes, cheapest)
        self._note_pressure(prefills or options.decodes)
        if not options.may_stay:
            assert pair[1] is not None  # where it may not stay, each decode worker has a linked prefill worker
            return pair[1]
        # A way that should be tried is reckoned to its end, even where it is out of the question.
        is_probe_due = pair[1] is not None and self.probing.due() is False
        stay = self._best_stay(options, decodes, pair[1] is not None, math.inf if is_probe_due else pair[0])
        return self.probing.choose(pair, stay)

    # ---- a pair

    def _prefills(self, options: Options) -> list[WorkerRecord]:
        if options.may_stay:
            return options.prefills
        # Rather a worker that failed it once than none.
        return list({worker.key: worker for d in options.decodes for worker in options.prefills_of(d)}.values())

    def _best_pair(self, options: Options, decodes: list[_Decoding], prefills: _Cheapest) -> Best:
        """Both begin with the cheapest, so most pairs need not be looked at."""
        best: Best = (math.inf, None)
        first = prefills.get(0)
        for decode_cost, _, decode in decodes:
            if first is None or decode_cost + first[0] >= best[0]:
                break
            best = self._best_with(options, decode_cost, decode, prefills, best)
        return best

    def _best_with(
        self, options: Options, decode_cost: float, decode: WorkerRecord, prefills: _Cheapest, best: Best
    ) -> Best:
        missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
        least_s = self._model.least_transfer_s(missing)
        place = num_tried = 0
        while num_tried < NUM_TRIED and (found := prefills.get(place)) is not None:
            if decode_cost + found[0] + least_s >= best[0]:
                break
            place += 1
            if found[1] not in decode.linked:
                continue
            num_tried += 1
            cost = decode_cost + found[0] + self._hand_off(options, decode, found, missing)
            if cost < best[0]:
                best = cost, Choice(decode, found[2])
        return best

    def _hand_off(self, options: Options, decode: WorkerRecord, found: _Computing, missing: int) -> float:
        """The transfer, and the pause by prompts that decode still computes for itself when this one arrives."""
        _, key, _, wait_s, prefill_s, _ = found
        transfer_s = self._model.transfer_s(key, decode.key, missing)
        busy_s = decode.prompts.wait_s(options.now) - (wait_s + prefill_s) - transfer_s
        return transfer_s + self._harm(self._model.stall * busy_s, decode) if busy_s > 0 else transfer_s

    # ---- one worker for all

    def _best_stay(self, options: Options, decodes: list[_Decoding], is_pair: bool, limit: float) -> Best:
        """The cheapest, where one costs less than `limit`. `is_pair`: it may be handed over instead."""
        bounds: list[tuple[float, int]] = []
        decodes = self._worth_a_look(options, decodes, limit)
        computing = self._computing(options, [decode for _, _, decode in decodes])
        for place, found in enumerate(computing):
            cost = self._staying(decodes[place][0], found, is_pair)
            if cost < limit:
                bounds.append((cost, place))
        bounds.sort()
        lowest = limit, -1  # before any that costs the same
        for bound, place in bounds:
            if bound > lowest[0]:
                break
            found = computing[place]
            cost = bound if found[5] else self._staying(decodes[place][0], self._in_full(found), is_pair)
            lowest = min(lowest, (cost, place))
        return (math.inf, None) if lowest[1] < 0 else (lowest[0], Choice(decodes[lowest[1]][2], None))

    def _worth_a_look(self, options: Options, decodes: list[_Decoding], limit: float) -> list[_Decoding]:
        """Without those whose streams would pay too much even if they were the quickest and held the most."""
        held = min(max(options.here_tokens.values(), default=0), options.most_cached)
        least_s = self._model.least_prefill_s(options.num_tokens - held, held) * ALMOST
        own_s, stall_s = least_s * (1.0 + self.pressure), least_s * self._model.stall
        return [
            entry
            for entry in decodes
            if not (num_streams := entry[2].num_streams) or entry[0] + own_s + num_streams * stall_s < limit
        ]

    @staticmethod
    def _staying(decode_cost: float, found: _Computing, is_pair: bool) -> float:
        cost = decode_cost + found[0]
        return cost * GAIN if is_pair and not found[2].num_streams else cost

    # ---- what things cost

    def _computing(self, options: Options, workers: list[WorkerRecord]) -> list[_Computing]:
        """Of each, at least what it costs all to compute the prompt there; exactly where nothing streams."""
        a, b, c, d, e = self._model.prefill_line
        speeds, stall, factor = self._model.speeds, self._model.stall, 1.0 + self.pressure
        beside, num_beside = self._beside, self._num_beside
        here, most, num_tokens, now = options.here_tokens, options.most_cached, options.num_tokens, options.now
        computing: list[_Computing] = []
        for worker in workers:
            key, queue, num_streams = worker.key, worker.prompts, worker.num_streams
            held = min(here[key], most) if key in here else 0
            new = num_tokens - held
            rate = b + c * (held + 0.5 * new) + d * worker.num_running
            if key in num_beside:
                rate += e * num_beside[key]
            prefill_s = a + new * rate
            if key in speeds:
                prefill_s *= speeds[key]
            wait_s = queue.wait_s(now) if queue.num_prompts else 0.0
            cost = wait_s + prefill_s * factor
            if num_streams:
                cost += num_streams * (stall * prefill_s)
            computing.append((cost, key, worker, wait_s, prefill_s, not (num_streams or key in beside)))
        return computing

    def _in_full(self, found: _Computing) -> _Computing:
        _, key, worker, wait_s, prefill_s, _ = found
        cost = wait_s + prefill_s * (1.0 + self.pressure)
        stall = self._model.stall
        if worker.num_streams:
            cost += worker.num_streams * self._harm(stall * prefill_s, worker, stall * wait_s)
        stall = self._model.neighbour_stall
        for neighbour in self._beside.get(key, ()):
            cost += neighbour.num_streams * self._harm(stall * prefill_s, neighbour, stall * wait_s)
        return cost, key, worker, wait_s, prefill_s, True

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

    def _decoding(self, options: Options) -> list[_Decoding]:
        """What its output costs on each worker, itself and others; the cheapest first."""
        model = self._model
        a, b, c, _, _ = model.token_line
        output = min(float(options.record.request.params.max_tokens), model.expected_output_tokens)
        tokens = options.num_tokens + output / 2
        slowdown_s = model.slowdown_s(int(tokens))
        decoding: list[_Decoding] = []
        for worker in options.decodes:
            num_streams = worker.num_streams
            own_s = a + b * (num_streams + 1) + c * (worker.used_blocks * worker.block_size + tokens)
            decoding.append((output * (own_s + num_streams * slowdown_s), worker.key, worker))
        decoding.sort()
        return decoding

    def _note_pressure(self, workers: list[WorkerRecord]) -> None:
        waiting = sum([worker.prompts.num_prompts - 1 for worker in workers if worker.prompts.num_prompts > 1])
        self.pressure += PRESSURE_WEIGHT * (waiting / len(workers) - self.pressure)


def _beside(
    decodes: list[WorkerRecord], prefills: list[WorkerRecord]
) -> tuple[dict[WorkerKey, list[WorkerRecord]], dict[WorkerKey, int]]:
    """For prefill workers, their neighbours with streams; and for any worker, how many neighbours are at work."""
    streaming: dict[WorkerKey, list[WorkerRecord]] = {}
    num_beside: dict[WorkerKey, int] = {}
    found = [decode for decode in decodes if decode.neighbours]
    computing = {worker.key for worker in prefills if worker.is_at_work} if found else set()
    for decode in found:
        if count := len(computing.intersection(decode.neighbours)):
            num_beside[decode.key] = num_beside.get(decode.key, 0) + count
        if not decode.num_streams and not decode.prompts.num_prompts:
            continue
        for key in decode.neighbours:
            num_beside[key] = num_beside.get(key, 0) + decode.is_at_work
            if decode.num_streams:
                streaming.setdefault(key, []).append(decode)
    return streaming, num_beside


class _Cheapest:
    """Workers in the order of what the prompt costs there; each is reckoned in full when its turn may have come."""

    def __init__(self, computing: list[_Computing], in_full: Callable[[_Computing], _Computing]) -> None:
        self._heap, self._in_full = computing, in_full
        self._found: list[_Computing] = []
        heapq.heapify(self._heap)

    def get(self, place: int) -> _Computing | None:
        """The one at this place; None when there are fewer."""
        found, heap = self._found, self._heap
        while len(found) <= place and heap:
            if heap[0][5]:
                found.append(heapq.heappop(heap))
            else:
                heapq.heapreplace(heap, self._in_full(heap[0]))
        return found[place] if place < len(found) else None
